"""What low precision costs: divergence, agreement and perplexity on held-out source code.

    .venv/bin/python bench/engine_quality.py [--model M] [--files 40] [--tokens 512]

Every variant reads the same text, which is the beginning of files of the standard library that the
seed picks, through the engine's own forward pass, and is compared with float32: Kullback-Leibler
divergence of the next token's distribution (nats, mean over positions), share of positions where
the most likely token is the same, and perplexity. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

from codellama.engine.blocks import BLOCK_TOKENS
from codellama.engine.cache import Span
from codellama.engine.engine import SHIPPED_MODEL
from codellama.engine.runner import Runner
from codellama.model.quantize import INT4_GROUPS, Int4Linear
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
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, Int4Linear.quantized(module.weight.data, group))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    exact, tokenizer = load(options.model, dtype="float32")
    parts = texts(tokenizer, options.files, options.tokens)
    n_blocks = -(-options.tokens // BLOCK_TOKENS)
    variants = {
        "bfloat16": (lambda: load(options.model)[0], None),
        "bfloat16, cache int8": (lambda: load(options.model)[0], torch.int8),
        "int8": (lambda: load(options.model, dtype="int8")[0], None),
        "int8, cache int8": (lambda: load(options.model, dtype="int8")[0], torch.int8),
        "int4 (as loaded: groups of 32, head int8)": (
            lambda: load(options.model, dtype="int4")[0],
            None,
        ),
    }
    for group in INT4_GROUPS:
        variants[f"int4, groups of {group}, head bfloat16"] = (
            lambda group=group: with_groups(options.model, group),
            None,
        )
    reference = Runner(exact, n_blocks, BLOCK_TOKENS)
    expected = [log_probabilities(reference, part) for part in parts]
    results: dict[str, dict[str, float]] = {"float32": {}}
    nats = [
        -e[:-1].gather(-1, torch.tensor(part[1:])[:, None]).mean()
        for e, part in zip(expected, parts, strict=True)
    ]
    results["float32"]["perplexity"] = float(torch.stack(nats).mean().exp())
    for name, (make, cache_dtype) in variants.items():
        runner = Runner(make(), n_blocks, BLOCK_TOKENS, cache_dtype)
        sums = torch.zeros(3, dtype=torch.float64)
        for part, true in zip(parts, expected, strict=True):
            got = log_probabilities(runner, part)
            chosen = got[:-1].gather(-1, torch.tensor(part[1:])[:, None])
            sums[0] += (true.exp() * (true - got)).sum(-1).mean().double()
            sums[1] += (true.argmax(-1) == got.argmax(-1)).double().mean()
            sums[2] -= chosen.mean().double()
        divergence, agreement, nats_a_token = (sums / len(parts)).tolist()
        results[name] = {
            "divergence_nats": divergence,
            "top_1_agreement": agreement,
            "perplexity": float(torch.tensor(nats_a_token).exp()),
        }
        print(name, results[name], file=sys.stderr)
    print(json.dumps({"n_tokens": sum(map(len, parts)), **results}))


if __name__ == "__main__":
    main()
