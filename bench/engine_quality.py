"""What low precision costs: divergence, agreement and perplexity on held-out source code.

    .venv/bin/python bench/engine_quality.py [--model M] [--files 40] [--tokens 512] [--mixed]

Every variant reads the same text, which is the beginning of files of the standard library that the
seed picks, through the engine's own forward pass, and is compared with float32: Kullback-Leibler
divergence of the next token's distribution (nats, mean over positions), share of positions where
the most likely token is the same, and perplexity. "Exact inputs" leaves out the rounding of inputs
to 8 bits that the compiled products do. --mixed also measures what int4 in one matrix alone costs,
and then keeps the matrices that cost most for their bytes in int8, a quarter and a half of them;
they are chosen on the second half of the files and measured on the first.
The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codellama.engine.blocks import BLOCK_TOKENS
from codellama.engine.cache import Span
from codellama.engine.engine import SHIPPED_MODEL
from codellama.engine.runner import Runner
from codellama.model.quantize import INT4_GROUPS, Int4Linear, quantized
from codellama.model.transformer import Transformer
from codellama.weights import load


def texts(tokenizer, n_files: int, n_tokens: int) -> list[list[int]]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    ids = [tokenizer.encode(file.read_text(encoding="utf-8"), bos=True) for file in files[:n_files]]
    return [part[:n_tokens] for part in ids if len(part) >= n_tokens]


@torch.inference_mode()
def log_probabilities(runner: Runner, text: list[int]) -> torch.Tensor:
    """[T, V] float32, through the paged cache."""
    n_blocks = -(-len(text) // BLOCK_TOKENS)
    span = Span(range(n_blocks), 0, len(text))
    return runner.logits(text, [span], list(range(len(text)))).log_softmax(-1)


def with_groups(path: str, group: int) -> Transformer:
    """All matrices of the blocks in int4 with this group, the head in bfloat16."""
    model, _ = load(path)
    return with_int4(model, {name: group for name in matrices(model)})


def matrices(model: Transformer) -> dict[str, nn.Linear]:
    """Those of the blocks."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def with_int4(model: Transformer, groups: dict[str, int]) -> Transformer:
    """These matrices in int4, the others of the blocks as they are."""
    for name, module in matrices(model).items():
        if name in groups:
            model.set_submodule(name, Int4Linear.quantized(module.weight.data, groups[name]))
    return model


def mixed(path: str, in_int8: set[str]) -> Transformer:
    """int4, except for these matrices and the head."""
    model, _ = load(path)
    for name, module in [*matrices(model).items(), ("lm_head", model.lm_head)]:
        kind = "int8" if name in in_int8 or name == "lm_head" else "int4"
        model.set_submodule(name, quantized(module.weight.data, kind))
    return model


Texts = list[list[int]]


def measure(runner: Runner, parts: Texts, expected: list[torch.Tensor]) -> dict[str, float]:
    sums = torch.zeros(3, dtype=torch.float64)
    for part, true in zip(parts, expected, strict=True):
        got = log_probabilities(runner, part)
        chosen = got[:-1].gather(-1, torch.tensor(part[1:])[:, None])
        sums[0] += (true.exp() * (true - got)).sum(-1).mean().double()
        sums[1] += (true.argmax(-1) == got.argmax(-1)).double().mean()
        sums[2] -= chosen.mean().double()
    divergence, agreement, nats_a_token = (sums / len(parts)).tolist()
    return {
        "divergence_nats": divergence,
        "top_1_agreement": agreement,
        "perplexity": float(torch.tensor(nats_a_token).exp()),
    }


def by_cost(path: str, parts: Texts, expected: list[torch.Tensor], n_blocks: int) -> list[str]:
    """Matrices, first the one whose int4 costs the most divergence a byte."""
    costs = {}
    for name, module in matrices(load(path)[0]).items():
        model = with_int4(load(path)[0], {name: 32})
        found = measure(Runner(model, n_blocks, BLOCK_TOKENS, native=False), parts, expected)
        costs[name] = found["divergence_nats"] / module.weight.numel()
    return sorted(costs, key=lambda name: -costs[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--mixed", action="store_true")
    options = parser.parse_args()
    exact, tokenizer = load(options.model, dtype="float32")
    parts = texts(tokenizer, options.files, options.tokens)
    n_blocks = -(-options.tokens // BLOCK_TOKENS)
    reference = Runner(exact, n_blocks, BLOCK_TOKENS)
    expected = [log_probabilities(reference, part) for part in parts]
    results: dict[str, dict[str, float]] = {"float32": measure(reference, parts, expected)}

    def note(name: str, model: Transformer, cache: Any = None, native: bool = True) -> None:
        results[name] = measure(
            Runner(model, n_blocks, BLOCK_TOKENS, cache, native), parts, expected
        )
        print(name, results[name], file=sys.stderr, flush=True)

    for dtype in ("bfloat16", "int8", "int4"):
        note(dtype, load(options.model, dtype=dtype)[0])
        note(f"{dtype}, cache int8", load(options.model, dtype=dtype)[0], torch.int8)
        if dtype != "bfloat16":
            note(f"{dtype}, exact inputs", load(options.model, dtype=dtype)[0], None, False)
    for group in INT4_GROUPS:
        note(f"int4, groups of {group}, head bfloat16", with_groups(options.model, group))
    if options.mixed:
        half = len(parts) // 2
        ranked = by_cost(options.model, parts[half:], expected[half:], n_blocks)
        parts, expected = parts[:half], expected[:half]
        for share in (0.0, 0.25, 0.5, 1.0):
            kept = set(ranked[: round(share * len(ranked))])
            note(f"int8 for {share:.0%} of the matrices", mixed(options.model, kept))
    print(json.dumps({"n_tokens": sum(map(len, parts)), **results}))


if __name__ == "__main__":
    main()
