"""Exact match of single lines of held-out packages: infilled (PSM, SPM) and completed.

    .venv/bin/python bench/infill_lines.py [--model M] [--corpus work/tiny/corpus] [--lines 500]

The packages of the validation split take turns. A line is drawn out of a part of a document as
training would see it (top-level statements, at most 2,400 characters). The model writes the line
with its indentation, greedily; its first line must equal the removed one, both stripped of white
space. Completing, left to right, the same model sees only what stands before the line. The last
line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict

from codellama import Engine, SamplingParams
from codellama.data.corpus import corpus_documents
from codellama.data.fim import split_document

MIN_LINE_CHARS = 8  # shorter ones are brackets, else: and the like
PARAMS = SamplingParams(max_tokens=64)


def draw_gaps(
    corpus: str, n_lines: int, engine: Engine, seed: int = 0
) -> list[tuple[str, str, str, str]]:
    """(package, prefix, line, suffix) of lines spread evenly over packages."""
    max_tokens = engine.max_context - PARAMS.max_tokens - 8  # room for the markers
    reader = corpus_documents(corpus, "validation")
    rng = random.Random(seed)
    by_package: dict[str, list[int]] = defaultdict(list)
    for index in range(len(reader)):
        by_package[reader.row(index)["repository"]].append(index)
    gaps = []
    while len(gaps) < n_lines:
        for package, indices in sorted(by_package.items()):
            part = rng.choice(split_document(reader.text(rng.choice(indices)), 2400))
            lines = part.splitlines(keepends=True)
            fitting = [n for n, line in enumerate(lines) if len(line.strip()) >= MIN_LINE_CHARS]
            if not fitting or len(engine.tokenizer.encode(part)) > max_tokens:
                continue
            n = rng.choice(fitting)
            prefix, suffix = "".join(lines[:n]), "\n" + "".join(lines[n + 1 :])
            gaps.append((package, prefix, lines[n].strip(), suffix))
    return gaps[:n_lines]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--corpus", default="work/tiny/corpus")
    parser.add_argument("--lines", type=int, default=500)
    options = parser.parse_args()
    engine = Engine(options.model)
    gaps = draw_gaps(options.corpus, options.lines, engine)
    begin = time.perf_counter()
    around = [(prefix, suffix) for _, prefix, _, suffix in gaps]
    results = {
        "psm": engine.infill(around, PARAMS),
        "spm": engine.infill(around, PARAMS, suffix_first=True),
        "left_to_right": engine.complete(
            [prefix for prefix, _ in around],
            SamplingParams(max_tokens=64, stop=("\n",)),
        ),
    }
    exact: dict[str, int] = {}
    by_package: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for way, completions in results.items():
        hits = []
        for (package, _, line, _), completion in zip(gaps, completions, strict=True):
            first = (completion.text.lstrip().splitlines() or [""])[0].strip()
            hits.append(first == line)
            by_package[package][way].append(first == line)
        exact[way] = sum(hits)
    for package, ways in sorted(by_package.items()):
        shares = "  ".join(f"{way} {sum(h)}/{len(h)}" for way, h in ways.items())
        print(f"{package:12} {shares}")
    print(
        json.dumps(
            {
                "bench": "infill_lines",
                "n_lines": len(gaps),
                "exact_match": {way: round(n / len(gaps), 4) for way, n in exact.items()},
                "ended_by_eot": {
                    way: sum(c.finish_reason == "stop" for c in results[way]) / len(gaps)
                    for way in ("psm", "spm")
                },
                "duration_s": round(time.perf_counter() - begin, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
