"""What a token costs with each setting that changes the choice, beside plain greedy decoding.

    .venv/bin/python bench/engine_settings.py [--new 96] [--runs 7] [--threads N] [--processor-time]

The shipped model, one sequence, its prompt in the cache, no guesses. Every figure is the median of
the runs after the first, in turns. The last line of output is one JSON object:
milliseconds a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from codellama import Engine, SamplingParams

ROW = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
SETTINGS = {
    "plain": {},
    "logit_bias": {"logit_bias": ((300, 1.0),)},
    "top_logprobs": {"logprobs": True, "top_logprobs": 5},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1},
    "schema": {"schema": json.dumps({"type": "array", "items": ROW, "minItems": 50})},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    engine = Engine(max_guesses=0)
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(options.runs):
        for name, settings in SETTINGS.items():
            begin = clock()
            params = SamplingParams(options.new, **settings)
            [result] = engine.complete(["# a table of names\n" * 20], params)
            times[name].append((clock() - begin) / len(result.token_ids))
    medians = {name: statistics.median(row[1:]) * 1e3 for name, row in times.items()}
    print(json.dumps({name: round(value, 3) for name, value in medians.items()}))


if __name__ == "__main__":
    main()
