"""Ship a trained stage with the package, with a model card made from its records.

    .venv/bin/python bench/release_model.py work/tiny code [--out src/codellama/pretrained]
        [--tokens-before N --history TEXT]

Reads the run's metrics and resolved settings and the corpus manifest, runs infill_lines.py and
compression.py on the held-out packages, samples completions, and writes checkpoint and card. The
last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from codellama import Engine, SamplingParams
from codellama.artifact import new_folder
from codellama.rows import read_rows
from codellama.train.metrics import METRICS_FILE

CARD = Path(__file__).parent / "model_card.md"
COMPLETIONS = (
    "class Person:\n    def __init__(self, name, age):\n",
    "import numpy as np\n\n\ndef mean(values):\n    return",
    "def read_lines(path):\n    with open(path) as f:\n",
    "for i in range(",
)
GAPS = (
    (
        "class Box:\n    def __init__(self, width, height):\n        self.width = width\n",
        "\n\n    def area(self):\n        return self.width * self.height\n",
    ),
    ("def is_empty(items):\n    return ", "\n\n\nprint(is_empty([]))\n"),
)


def bench(script: str, model: Path, corpus: Path) -> dict[str, Any]:
    """The JSON object that another bench script prints."""
    command = [sys.executable, str(Path(__file__).parent / script)]
    command += ["--model", str(model), "--corpus", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def card(
    work: Path, stage: str, results: dict[str, Any], tokens_before: float, history: str
) -> str:
    """Fill in the model card from what the run and the benches recorded."""
    run_dir = work / "runs" / stage
    corpus = json.loads((work / "corpus" / "manifest.json").read_text(encoding="utf-8"))
    record = json.loads((run_dir / "recipe.json").read_text(encoding="utf-8"))
    settings = record["settings"]
    rows = read_rows(run_dir / METRICS_FILE)
    steps = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row][-1]
    training_s = sum(settings["batch_tokens"] / row["tokens_per_s"] for row in steps)
    licences = sorted(corpus["licences"].items(), key=lambda item: -item[1]["n_bytes"])
    infilled, compressed = results["infill_lines"], results["compression"]
    fields = {
        "name": record["model"]["name"],
        "n_params": f"{results['n_params']:,}",
        "n_documents": f"{corpus['n_documents']['train']:,}",
        "n_megabytes": f"{corpus['n_bytes']['train'] / 1e6:,.0f}",
        "n_tokens": f"{(tokens_before + steps[-1]['tokens']) / 1e6:.1f}",
        "history": f"{history.rstrip()} Then " if history else "",
        "held_out": ", ".join(corpus["held_out"]),
        "licences": "\n".join(
            f"| {name} | {counts['n_documents']:,} | {counts['n_bytes'] / 1e6:,.1f} |"
            for name, counts in licences
        ),
        **{name: settings[name] for name in ("fim_rate", "spm_share", "peak_lr", "final_lr_ratio")},
        **{name: f"{settings[name]:,}" for name in ("steps", "batch_tokens", "seq_len")},
        "hours": f"{training_s / 3600:.1f}",
        "validation_loss": f"{validation['validation_loss']:.3f}",
        "validation_bits": f"{validation['validation_bits_per_byte']:.3f}",
        "n_files": compressed["n_files"],
        "file_megabytes": f"{compressed['n_bytes'] / 1e6:.1f}",
        **{f"bits_{way}": f"{bits:.3f}" for way, bits in compressed["bits_per_byte"].items()},
        "n_lines": infilled["n_lines"],
        **{f"exact_{way}": f"{share:.1%}" for way, share in infilled["exact_match"].items()},
        **{f"ended_{way}": f"{share:.0%}" for way, share in infilled["ended_by_eot"].items()},
        "samples": "\n\n".join(samples(Engine(results["model"]))),
    }
    return CARD.read_text(encoding="utf-8").format_map(fields)


def samples(engine: Engine) -> list[str]:
    """Greedy completions and infills as Markdown."""
    params = SamplingParams(max_tokens=48, stop=("\n\n",))
    completed = engine.complete(COMPLETIONS, params)
    filled = engine.infill(GAPS, SamplingParams(max_tokens=48))
    texts = [f"{p}⟦{r.text}⟧" for p, r in zip(COMPLETIONS, completed, strict=True)]
    texts += [f"{g[0]}⟦{r.text}⟧{g[1]}" for g, r in zip(GAPS, filled, strict=True)]
    return [f"```python\n{text.rstrip()}\n```" for text in texts]


def main() -> None:
    """Measure, write the card, and replace the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, default=Path("src/codellama/pretrained"))
    parser.add_argument(
        "--tokens-before", type=float, default=0, help="of the weights it began with"
    )
    parser.add_argument("--history", default="", help="how those were trained, for the card")
    options = parser.parse_args()
    checkpoint = options.work / "runs" / options.stage / "checkpoint"
    corpus = options.work / "corpus"
    results: dict[str, Any] = {"model": str(checkpoint)}
    for name in ("infill_lines", "compression"):
        results[name] = bench(f"{name}.py", checkpoint, corpus)
        print(name, results[name], flush=True)
    engine = Engine(checkpoint, dtype="float32")
    results["n_params"] = sum(p.numel() for p in engine._runner.model.parameters())
    text = card(options.work, options.stage, results, options.tokens_before, options.history)
    with new_folder(options.out) as folder:
        for file in sorted(checkpoint.iterdir()):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "README.md").write_text(text, encoding="utf-8")
        results["n_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    print(json.dumps({"bench": "release_model", **results}))


if __name__ == "__main__":
    main()
