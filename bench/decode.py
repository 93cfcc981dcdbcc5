"""Prefill and decode speed of the engine beside Transformers and llama.cpp: same weights, one run.

    .venv/bin/python bench/decode.py [--shapes shipped,15m,1.1b] [--precisions bfloat16,int8,int4]
        [--batches 1,8,32] [--prompt 128] [--new 64] [--runs 3] [--folder F] [--llama-python P]
        [--threads N] [--processor-time]

"shipped" is the model of the package, the others are random weights in that shape, written to a
temporary folder. Every figure is the median of `runs`, after one that does not count, with torch's
number of threads for all. Decode speed is that of the tokens after the first; the time to the first
covers the prompt. The engine runs without guesses and every prompt is a new one, so that nothing is
reused. llama.cpp is called through llama-cpp-python, in the interpreter of --llama-python where it
is not installed beside this one, on a file that `codellama convert` wrote: bfloat16 beside ours in
bfloat16, Q8_0 beside int8, Q4_0 beside int4. The memory bandwidth is what summing 1 GiB reaches.
With --processor-time
the clock counts what this process computed instead of what passed, which says something with one
thread on a machine that others use too. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from codellama import Engine, SamplingParams
from codellama.engine.engine import SHIPPED_MODEL
from codellama.model.config import ModelConfig
from codellama.weights import convert, load

sys.path.insert(0, str(Path(__file__).parent))
from load_checkpoint import build

SHAPES = {
    "15m": ModelConfig(288, 6, 6, 6, 768, 8196, max_position_embeddings=2048),
    "1.1b": ModelConfig(2048, 22, 32, 4, 5632, 32016, max_position_embeddings=2048),
    "7b-thin": ModelConfig(4096, 4, 32, 32, 11008, 32016, max_position_embeddings=2048),
}
GGUF = {"bfloat16": ("bfloat16", None), "int8": (None, "q8_0"), "int4": (None, "q4_0")}
Times = tuple[float, float]
"""Seconds to the first token of all, and from there to the last."""
Clock = Callable[[], float]

LLAMA = """
import json, sys, time
import llama_cpp
path, clock = sys.argv[1], getattr(time, sys.argv[2])
n_threads, n_prompt, n_new, runs, vocabulary = map(int, sys.argv[3:])
model = llama_cpp.Llama(path, n_ctx=n_prompt + n_new, n_threads=n_threads,
    n_threads_batch=n_threads, n_batch=512, verbose=False)
times = []
for run in range(runs + 1):
    prompt = [(7919 * (i + 1) * (run + 3)) % (vocabulary - 300) + 259 for i in range(n_prompt)]
    model.reset()
    begin = clock()
    model.eval(prompt)
    first = clock()
    for i in range(n_new - 1):
        model.eval([(300 + 31 * i) % vocabulary])
    times.append((first - begin, clock() - first))
print(json.dumps(times[1:]))
"""


def bandwidth() -> float:
    """Bytes a second that all threads read together."""
    block = torch.ones(1 << 28)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - begin)
    return block.nbytes / statistics.median(times[1:])


def draw_prompts(n: int, n_tokens: int, vocabulary: int) -> list[list[int]]:
    return [[random.randrange(259, vocabulary - 8) for _ in range(n_tokens)] for _ in range(n)]


def run_engine(engine: Engine, prompts: list[list[int]], n_new: int, clock: Clock) -> Times:
    """Through the interface that a server uses; no token ends the text."""
    params = SamplingParams(max_tokens=n_new)
    news: SimpleQueue[int] = SimpleQueue()
    begin = clock()
    generations = [engine.submit(p, params, (), lambda: news.put(0), False) for p in prompts]
    waiting = generations
    while waiting:  # the listener tells of text, and the first token may not bring any
        waiting = [g for g in waiting if len(g.sequence.tokens) == g.sequence.n_prompt]
        time.sleep(0.0002)
    first = clock()
    for _ in generations:
        news.get()
    end = clock()
    assert all(len(g.read().token_ids) == n_new for g in generations)
    return first - begin, end - first


def run_transformers(model: Any, prompts: list[list[int]], n_new: int, clock: Clock) -> Times:
    ids = torch.tensor(prompts)
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def generate(n_tokens: int) -> float:
        begin = clock()
        model.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, **kwargs)
        return clock() - begin

    first = generate(1)
    return first, generate(n_new) - first


def median_of(run: Callable[[list[list[int]]], Times], draw: Callable[[], list[list[int]]], n: int):
    times = [run(draw()) for _ in range(n + 1)][1:]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def speeds(times: Any, n_sequences: int, options: argparse.Namespace) -> dict[str, float]:
    first, rest = times
    return {
        "first_token_s": round(first, 4),
        "prefill_tokens_per_s": round(n_sequences * options.prompt / first, 1),
        "decode_tokens_per_s": round(n_sequences * (options.new - 1) / rest, 1),
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """What one decoding step reads: all but the embedding."""
    return sum(
        tensor.nbytes for name, tensor in model.state_dict().items() if "embed_tokens" not in name
    )


def bench_engine(
    folder: Path, precision: str, batches: list[int], options: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    model, tokenizer = load(folder, dtype=precision)
    vocabulary = model.config.vocab_size
    results: dict[str, Any] = {"weight_bytes": weight_bytes(model)}
    for n in batches:
        engine = Engine.of(model, tokenizer, max_guesses=0, max_batch=max(batches), **more)
        times = median_of(
            lambda prompts, engine=engine: run_engine(engine, prompts, options.new, options.clock),
            lambda n=n: draw_prompts(n, options.prompt, vocabulary),
            options.runs,
        )
        results[f"batch {n}"] = speeds(times, n, options)
    first = results.get("batch 1")
    if first:
        first["bytes_per_s"] = first["decode_tokens_per_s"] * results["weight_bytes"]
    return results


def bench_transformers(
    folder: Path, batches: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    vocabulary = model.config.vocab_size
    results = {}
    for n in batches:
        times = median_of(
            lambda prompts: run_transformers(model, prompts, options.new, options.clock),
            lambda n=n: draw_prompts(n, options.prompt, vocabulary),
            options.runs,
        )
        results[f"batch {n}"] = speeds(times, n, options)
    return results


def bench_llama(folder: Path, precision: str, options: argparse.Namespace) -> dict[str, Any] | str:
    dtype, quantize = GGUF[precision]
    path = Path(options.work) / "model.gguf"
    path.unlink(missing_ok=True)
    convert(folder, path, "gguf", dtype=dtype, quantize=quantize)
    sizes = (torch.get_num_threads(), options.prompt, options.new, options.runs)
    vocabulary = ModelConfig.from_hf(json.loads((folder / "config.json").read_text())).vocab_size
    command = [options.llama_python, "-c", LLAMA, str(path), options.clock.__name__]
    command += map(str, (*sizes, vocabulary))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path.unlink()
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1]
    columns = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    return {"batch 1": speeds([statistics.median(column) for column in columns], 1, options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="shipped,15m")
    parser.add_argument("--precisions", default="bfloat16,int8,int4")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor-time", action="store_true", help="where others use the machine"
    )
    options = parser.parse_args()
    options.clock = time.process_time if options.processor_time else time.perf_counter
    torch.set_num_threads(options.threads)
    batches = [int(n) for n in options.batches.split(",")]
    random.seed(0)
    results: dict[str, Any] = {
        "threads": options.threads,
        "clock": options.clock.__name__,
        "load_average": os.getloadavg()[0],
        "bandwidth_bytes_per_s": bandwidth(),
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
    }
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as work:
            options.work = work
            folder = SHIPPED_MODEL if shape == "shipped" else Path(work) / "model"
            if shape != "shipped":
                build(folder, SHAPES[shape])
            found = results[shape] = {}

            def note(name: str, figures: Any, shape: str = shape, found: Any = found) -> None:
                found[name] = figures
                print(shape, name, json.dumps(figures), file=sys.stderr, flush=True)
                gc.collect()

            for precision in options.precisions.split(","):
                note(f"ours {precision}", bench_engine(folder, precision, batches, options))
                if not options.no_peers:
                    name = f"llama.cpp {GGUF[precision][1] or precision}"
                    note(name, bench_llama(folder, precision, options))
            if not options.no_peers:
                note("Transformers bfloat16", bench_transformers(folder, batches, options))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
