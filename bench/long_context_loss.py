"""Loss by position on held-out files longer than any training sequence, for several checkpoints.

    .venv/bin/python bench/long_context_loss.py code=RUN/checkpoint base=RUN/checkpoint \
        [--corpus work/tiny/corpus] [--length 8192] [--files 24] [--plot FILE.png]

Every checkpoint reads the same first `length` tokens of the same files, in one pass each, with
the rotary base that its config has. The last line of output is one JSON object: nats per token in
each stretch of positions. Source: paper 3.3 and figure 4a.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

import codellama
from codellama.data.corpus import corpus_documents
from codellama.model.attention import causal

CHUNK = 1024  # positions whose logits stand in memory at a time


@torch.inference_mode()
def losses(folder: str, texts: list[str], length: int) -> torch.Tensor:
    """Nats of each token after the first, averaged over the texts: [length - 1]."""
    model, tokenizer = codellama.load(folder, dtype="float32")
    total = torch.zeros(length - 1)
    for text in texts:
        tokens = torch.tensor([tokenizer.encode(text, bos=True)[:length]])
        hidden = model.model(tokens, torch.arange(length)[None], causal)[0]
        for begin in range(0, length - 1, CHUNK):
            rows = slice(begin, min(begin + CHUNK, length - 1))
            targets = tokens[0, rows.start + 1 : rows.stop + 1]
            total[rows] += F.cross_entropy(model.lm_head(hidden[rows]), targets, reduction="none")
    return total / len(texts)


def long_files(corpus: str, tokenizer: codellama.Tokenizer, length: int, limit: int) -> list[str]:
    """Held-out files of at least `length` tokens, spread over the whole split."""
    documents = corpus_documents(corpus, "validation")
    found = [t for t in documents if len(t) > length and len(tokenizer.encode(t)) >= length]
    if not found:
        raise SystemExit(f"{corpus}: no held-out file has {length} tokens; lower --length")
    return found[:: max(1, len(found) // limit)][:limit]


def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--corpus", default="work/tiny/corpus")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    named = dict(part.split("=", 1) for part in options.checkpoints)
    tokenizer = codellama.Tokenizer.load(next(iter(named.values())))
    texts = long_files(options.corpus, tokenizer, options.length, options.files)
    borders = [128, 256]
    while borders[-1] < options.length:
        borders.append(min(2 * borders[-1], options.length))
    stretches = list(itertools.pairwise(borders))
    result: dict[str, dict[str, float]] = {}
    for name, folder in named.items():
        by_position = losses(folder, texts, options.length)
        result[name] = {
            f"{a}-{b}": round(by_position[a : b - 1].mean().item(), 4) for a, b in stretches
        }
        print(name, result[name], flush=True)
    if options.plot:
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name, values in result.items():
            axes.plot([b for _, b in stretches], list(values.values()), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="position (end of stretch)", ylabel="loss (nats per token)")
        axes.legend()
        figure.savefig(options.plot, dpi=120)
    print(json.dumps({"bench": "long_context_loss", "n_files": len(texts), "loss": result}))


if __name__ == "__main__":
    main()
