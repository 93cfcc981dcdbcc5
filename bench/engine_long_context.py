"""Prefill of long prompts: speed and memory against length, beside the cache arithmetic.

    .venv/bin/python bench/engine_long_context.py [--lengths 4096,16384,32768,100000] [--cache int8]
        [--layers N --model 7b]

Random weights in the shape of `tiny` (or another, with fewer layers), rotary base 1e6, bfloat16.
Each length runs in a process of its own: one prompt, continued by 17 tokens. "Memory" is
the peak of what no file backs (RssAnon) above that before the engine was made; "cache" is the bytes
of that many positions by the model's arithmetic. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from codellama import Engine, SamplingParams
from codellama.engine.cache import PagedCache
from codellama.engine.generator import Ask
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer

sys.path.insert(0, str(Path(__file__).parent))
from load_checkpoint import Memory, vocabulary

NEW_TOKENS = 17


def measure(n_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    config = ModelConfig.named(options.model).replace(
        rope_theta=1e6, max_position_embeddings=n_tokens + NEW_TOKENS
    )
    if options.layers:
        config = config.replace(num_hidden_layers=options.layers)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu").bfloat16().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
    tokenizer = vocabulary(config.vocab_size)
    memory = Memory()
    engine = Engine.of(
        model,
        tokenizer,
        max_batch=1,
        cache_tokens=n_tokens + NEW_TOKENS,
        cache_dtype=options.cache,
        max_guesses=0,
    )
    prompt = torch.randint(259, config.vocab_size - 8, (n_tokens,)).tolist()
    begin = time.perf_counter()
    moments: list[float] = []
    sequence = engine._sequence(Ask(prompt, params=SamplingParams(max_tokens=NEW_TOKENS)))
    engine._batcher.submit(sequence, lambda: moments.append(time.perf_counter()), True)
    while sequence.n_prompt == len(sequence.tokens):
        time.sleep(0.001)
    first = time.perf_counter()
    if (thread := engine._batcher._thread) is not None:
        thread.join()
    end = time.perf_counter()
    dtype = torch.int8 if options.cache == "int8" else torch.bfloat16
    peak = memory.stop()["anonymous_peak_bytes"]
    cache = n_tokens * PagedCache.bytes_per_token(config, dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "first_token_s": round(first - begin, 3),
        "prefill_tokens_per_s": round(n_tokens / (first - begin), 1),
        "decode_tokens_per_s": round((NEW_TOKENS - 1) / (end - first), 1),
        "memory_bytes": peak,
        "cache_bytes": cache,
        "weight_bytes": weights,
        "memory_ratio": round((peak + weights) / (cache + weights), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="4096,16384,32768,100000")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cache", default="bfloat16")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    results: dict[str, Any] = {"model": options.model, "threads": torch.get_num_threads()}
    for length in options.lengths.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", length]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[length] = json.loads(output)
        print(length, output.strip(), file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
