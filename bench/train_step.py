"""Training steps of one shape, ours beside Transformers' LlamaForCausalLM in a plain loop.

    .venv/bin/python bench/train_step.py [--model tiny] [--seq-len 1024] [--batch 8] [--steps 8]

Both train the same shape from the same weights on the same packed batches, new documents of new
lengths in every step, bfloat16 autocast over float32 weights, fused AdamW, clipping; each in a
process of its own, which also measures its peak memory. Transformers is run eager and compiled, its
attention is SDPA with the document mask. The runs alternate, and medians are taken over rounds. The
last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from codellama.data.loader import Batch
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer
from codellama.recipe import Stage
from codellama.train.loss import LossFunction
from codellama.train.metrics import matrix_flops_per_s
from codellama.train.optim import make_optimizer

WARM_UP = 4
WAYS = ("ours", "transformers_eager", "transformers_compiled")
CUTS = 2  # document borders in a row, drawn uniformly: 340 tokens a document on average at 1,024


def make_batch(config: ModelConfig, n_rows: int, seq_len: int, seed: int) -> Batch:
    """Random tokens in documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, config.vocab_size, (n_rows, seq_len), generator=generator)
    place = torch.arange(seq_len).expand(n_rows, seq_len)
    cuts = torch.randint(1, seq_len, (n_rows, CUTS), generator=generator)
    document_ids = (place[:, :, None] >= cuts[:, None]).sum(-1)
    starts = torch.where(place[:, :, None] >= cuts[:, None], cuts[:, None], 0).amax(-1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Batch(tokens, tokens.roll(-1, dims=1), mask, document_ids, place - starts)


def our_step(config: ModelConfig, stage: Stage) -> Callable[[Batch], float]:
    """One optimiser step of ours."""
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, stage)
    forward = LossFunction(model, stage)

    def step(batch: Batch) -> float:
        weights = batch.loss_mask.float() / batch.loss_mask.sum()
        loss = forward(batch, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def their_step(config: ModelConfig, stage: Stage, is_compiled: bool) -> Callable[[Batch], float]:
    """One optimiser step of Transformers' model in a plain loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = config.to_hf() | {"attn_implementation": "sdpa", "use_cache": False}
    model: Any = LlamaForCausalLM(LlamaConfig(**settings)).float().train()
    ours = Transformer(config)
    ours.initialise(torch.Generator().manual_seed(0))
    model.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(model, stage)
    ordered = torch.ones(stage.seq_len, stage.seq_len, dtype=torch.bool).tril()
    run = torch.compile(model) if is_compiled else model

    def step(batch: Batch) -> float:
        same = batch.document_ids[:, :, None] == batch.document_ids[:, None, :]
        mask = (same & ordered)[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(
                input_ids=batch.tokens, attention_mask=mask, position_ids=batch.positions
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then time steps; runs in a process of its own."""
    config = ModelConfig.named(options.model)
    stage = Stage(
        steps=1,
        seq_len=options.seq_len,
        micro_batch=options.batch,
        batch_tokens=options.seq_len * options.batch,
        peak_lr=1e-4,
    )
    if way == "ours":
        step = our_step(config, stage)
    else:
        step = their_step(config, stage, way.endswith("compiled"))
    n_batches = options.steps + WARM_UP
    batches = [make_batch(config, options.batch, options.seq_len, i) for i in range(n_batches)]
    first_loss = step(batches[0])
    for batch in batches[1:WARM_UP]:
        step(batch)
    durations = []
    for batch in batches[WARM_UP:]:
        begin = time.perf_counter()
        loss = step(batch)
        durations.append(time.perf_counter() - begin)
    tokens_per_s = stage.batch_tokens / statistics.median(durations)
    peak = matrix_flops_per_s("cpu", torch.bfloat16)
    return {
        "tokens_per_s": round(tokens_per_s),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "first_loss": first_loss,
        "last_loss": loss,
        "matrix_gflops_per_s": round(peak / 1e9),
        "mfu": round(tokens_per_s * config.train_flops_per_token(options.seq_len) / peak, 4),
    }


def main() -> None:
    """Run every way in turn, several rounds, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{way} failed: {done.stderr[-2000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            rounds[way].append(result)
            print(f"round {number + 1}  {way:22} {result}", flush=True)
    medians = {
        way: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for way, results in rounds.items()
    }
    ours = medians["ours"]
    ratios = {
        f"{key}_vs_{way}": round(ours[key] / medians[way][key], 3)
        for way in WAYS[1:]
        for key in ("tokens_per_s", "peak_memory_mb")
    }
    print(
        json.dumps(
            {"bench": "train_step", **vars(options), "threads": torch.get_num_threads()}
            | {"medians": medians, "ratios": ratios}
        )
    )


if __name__ == "__main__":
    main()
