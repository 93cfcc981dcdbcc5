"""Exact match of lines of held-out packages: infilled (PSM, SPM) and completed.

    .venv/bin/python bench/infill_lines.py [--model M] [--corpus work/tiny/corpus] [--lines 500]
        [--bodies]

What is asked and compared: src/codellama/eval/held_out_lines.py. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

from codellama import Engine
from codellama.eval.held_out_lines import draw_gaps, fill_lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--corpus", default="work/tiny/corpus")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--bodies", action="store_true", help="of functions, of at most 3 lines")
    options = parser.parse_args()
    engine = Engine(options.model)
    gaps = draw_gaps(options.corpus, options.lines, engine, bodies=options.bodies)
    begin = time.perf_counter()
    result = fill_lines(engine, gaps)
    for package in sorted({gap.package for gap in result.gaps}):
        own = [i for i, gap in enumerate(result.gaps) if gap.package == package]
        shares = "  ".join(
            f"{way} {sum(hits[i] for i in own)}/{len(own)}" for way, hits in result.hits.items()
        )
        print(f"{package:12} {shares}")
    print(
        json.dumps(
            {
                "bench": "infill_lines",
                "bodies": options.bodies,
                "n_lines": len(result.gaps),
                "exact_match": result.exact_match(),
                "ended_by_eot": result.ended_by_eot,
                "nothing_else": result.nothing_else,
                "duration_s": round(time.perf_counter() - begin, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
