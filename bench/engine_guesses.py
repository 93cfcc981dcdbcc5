"""What guessing from the text saves, and costs where it does not help.

    .venv/bin/python bench/engine_guesses.py [--model M] [--dtype D] [--prompts 24] [--new 128]

One prompt at a time, with and without guesses in turn, on files of the standard library that the
seed picks: "continue" goes on where a file was cut, "edit" shows a part of a file and then its
first lines once more, as an editor that asks for the changed version does, and "noise" samples at a
temperature at which nothing repeats. The speed-up is the ratio of total times, of which each prompt
contributes the median of `runs`. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch

from codellama import Engine, SamplingParams
from codellama.engine.engine import SHIPPED_MODEL
from codellama.weights import load


def draw_texts(n: int) -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    return random.Random(0).sample([text for text in texts if len(text) > 6000], n)


def timed(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[float, tuple]:
    engine._scheduler.pool.forget()
    begin = time.perf_counter()
    result = engine.complete([prompt], params)[0]
    return time.perf_counter() - begin, result.token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=options.dtype)
    engines = {"plain": Engine.of(model, tokenizer, max_guesses=0), "guessing": None}
    engines["guessing"] = Engine.of(model, tokenizer)
    greedy = SamplingParams(max_tokens=options.new)
    encoded = [tokenizer.encode(text, bos=True) for text in draw_texts(options.prompts)]
    work = {
        "continue": ([ids[:400] for ids in encoded], greedy),
        "edit": ([[*ids[:300], *ids[1:60]] for ids in encoded], greedy),
        "noise": (
            [ids[:400] for ids in encoded],
            SamplingParams(max_tokens=options.new, temperature=2.0, seed=0),
        ),
    }
    results: dict[str, dict[str, float]] = {}
    for name, (prompts, params) in work.items():
        totals = dict.fromkeys(engines, 0.0)
        n_tokens = n_same = 0
        speculator = engines["guessing"]._batcher._speculator
        speculator.n_guessed = speculator.n_right = 0
        for prompt in prompts:
            times: dict[str, list[float]] = {kind: [] for kind in engines}
            ids = {}
            for _ in range(options.runs):
                for kind, engine in engines.items():
                    duration, ids[kind] = timed(engine, prompt, params)
                    times[kind].append(duration)
            for kind in engines:
                totals[kind] += statistics.median(times[kind])
            n_tokens += len(ids["plain"])
            n_same += ids["plain"] == ids["guessing"]
        results[name] = {
            "plain_tokens_per_s": round(n_tokens / totals["plain"], 1),
            "guessing_tokens_per_s": round(n_tokens / totals["guessing"], 1),
            "speed_up": round(totals["plain"] / totals["guessing"], 3),
            "same_text": n_same / len(prompts),
            "right_of_guessed": round(speculator.n_right / max(1, speculator.n_guessed), 3),
        }
        print(name, results[name], file=sys.stderr)
    print(json.dumps({"threads": torch.get_num_threads(), "dtype": options.dtype, **results}))


if __name__ == "__main__":
    main()
