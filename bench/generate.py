"""Prefill and decode speed of the engine beside llama.cpp and Transformers: same weights, one run.

    .venv/bin/python bench/generate.py [--shapes shipped,15m] [--precisions bfloat16,int8,int4]
        [--batches 1,8,32] [--prompt 128] [--prefill 512] [--new 64] [--runs 3] [--folder F]
        [--llama-python P] [--llama-float F] [--keystroke N] [--threads N] [--processor-time]
        [--no-peers] [--no-transformers]

"shipped" is the model of the package, a folder is a checkpoint, the others are random weights in
that shape, written to a temporary folder. Every figure is the median of `runs`, after one that does
not count, with torch's number of threads for all. Decode speed is that of the tokens after the
first, of all sequences together, which is what llama-batched-bench calls TG; prefill speed is that
of one prompt of its own length. The engine runs without guesses and every prompt is a new one, so
that nothing is reused. "memory_of_weights_and_cache" is the largest peak of memory that no file
backs, from before the weights were loaded, beside the bytes of all weights and the cache.
--keystroke puts a token into the end of a prompt of that many, in int8. llama.cpp is called through
llama-cpp-python, in the interpreter of --llama-python where it is not installed beside this one
(LLAMA_CPP_LIB_PATH names a build of the library), on a file that `codellama convert` wrote:
bfloat16 or --llama-float beside ours in bfloat16, Q8_0 beside int8, Q4_0 beside int4. The machine's
limits stand beside each figure: the bytes a second that summing 1 GiB in large pages reads, and the
products of 2,048 cubed in PyTorch. With --processor-time the clock counts what this process
computed instead of what passed, which says something with one thread on a machine that others use
too. A table goes to standard error; the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
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
from codellama.engine.generator import Ask
from codellama.engine.native import gather
from codellama.model.config import ModelConfig
from codellama.weights import convert, load

sys.path.insert(0, str(Path(__file__).parent))
from load_checkpoint import Memory, build

SHAPES = {
    "15m": ModelConfig(288, 6, 6, 6, 768, 8196, max_position_embeddings=2048),
    "1.1b": ModelConfig(2048, 22, 32, 4, 5632, 32016, max_position_embeddings=2048),
    "7b-thin": ModelConfig(4096, 4, 32, 32, 11008, 32016, max_position_embeddings=2048),
    "7b": ModelConfig(4096, 32, 32, 32, 11008, 32016, max_position_embeddings=2048),
}
GGUF = {"bfloat16": ("bfloat16", None), "int8": (None, "q8_0"), "int4": (None, "q4_0")}
Times = tuple[float, float]
"""Seconds to the first token of all, and from there to the last."""
Clock = Callable[[], float]

LLAMA = """
import json, random, sys, time
import llama_cpp as lib
path, clock = sys.argv[1], getattr(time, sys.argv[2])
n_threads, n_prompt, n_prefill, n_new, runs, vocabulary = map(int, sys.argv[3:9])
lib.llama_backend_init()
settings = lib.llama_model_default_params()
settings.use_extra_bufts = sys.argv[10] == "repacked"
model = lib.llama_model_load_from_file(path.encode(), settings)

def measure(n_sequences, n_prompt, n_new):
    params = lib.llama_context_default_params()
    params.n_ctx = n_sequences * -(-(n_prompt + n_new) // 256) * 256
    params.n_seq_max, params.n_batch, params.n_ubatch = n_sequences, 512, 512
    params.n_threads = params.n_threads_batch = n_threads
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(512, 0, 1)

    def run(tokens):  # (token, position, sequence, whether its logits are wanted)
        for begin in range(0, len(tokens), 512):
            part = tokens[begin:begin + 512]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            if lib.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            lib.llama_synchronize(context)

    times = []
    for _ in range(runs + 1):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        begin = clock()
        run([(random.randrange(259, vocabulary - 8), at, sequence, at == n_prompt - 1)
             for sequence in range(n_sequences) for at in range(n_prompt)])
        first = clock()
        for at in range(n_prompt, n_prompt + n_new - 1):
            run([(random.randrange(259, vocabulary - 8), at, sequence, True)
                 for sequence in range(n_sequences)])
        times.append((first - begin, clock() - first))
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return times[1:]

results = {"prefill": measure(1, n_prefill, 1)}
for n in map(int, sys.argv[9].split(",")):
    results[f"batch {n}"] = measure(n, n_prompt, n_new)
print(json.dumps(results))
"""


def bandwidth(clock: Clock) -> float:
    """Bytes a second that all threads read together."""
    holder = torch.nn.ParameterList([torch.ones(1 << 28)])
    gather(holder)
    [block] = holder
    times = []
    for _ in range(6):
        begin = clock()
        block.sum()
        times.append(clock() - begin)
    return block.nbytes / statistics.median(times[1:])


def products_per_s(dtype: torch.dtype) -> float:
    """Operations a second of a square product in PyTorch."""
    n = 2048
    if dtype == torch.int8:
        a = torch.randint(-127, 127, (n, n), dtype=dtype)
        multiply = functools.partial(torch._int_mm, a, a)
    else:
        a = torch.randn(n, n, dtype=dtype)
        multiply = functools.partial(torch.mm, a, a)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / statistics.median(times[1:])


def draw_prompts(n: int, n_tokens: int, vocabulary: int) -> list[list[int]]:
    return [[random.randrange(259, vocabulary - 8) for _ in range(n_tokens)] for _ in range(n)]


def run_engine(engine: Engine, prompts: list[list[int]], n_new: int, clock: Clock) -> Times:
    """Through the interface that a server uses; no token ends the text."""
    params = SamplingParams(max_tokens=n_new)
    news: SimpleQueue[int] = SimpleQueue()
    begin = clock()
    sequences = [engine._sequence(Ask(prompt, params=params)) for prompt in prompts]
    for sequence in sequences:
        engine._batcher.submit(sequence, lambda: news.put(0), False)
    waiting = sequences
    while waiting:  # the listener tells of text, and the first token may not bring any
        waiting = [s for s in waiting if len(s.tokens) == s.n_prompt]
        time.sleep(0.0002)
    first = clock()
    for _ in sequences:
        news.get()
    end = clock()
    assert all(len(sequence.token_ids) == n_new for sequence in sequences)
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
        "decode_tokens_per_s": round(n_sequences * (options.new - 1) / rest, 1),
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """What one decoding step reads: all but the embedding."""
    return sum(
        tensor.nbytes for name, tensor in model.state_dict().items() if "embed_tokens" not in name
    )


def bench_engine(
    folder: Path, precision: str, batches: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    memory = Memory()
    model, tokenizer = load(folder, dtype=precision)
    gather(model)
    vocabulary = model.config.vocab_size
    results: dict[str, Any] = {"weight_bytes": weight_bytes(model)}

    def start(n: int, n_prompt: int, n_new: int) -> Engine:
        tokens = n * (n_prompt + n_new + 16)
        return Engine.of(model, tokenizer, max_guesses=0, max_batch=n, cache_tokens=tokens)

    def share_of_memory(n: int, n_prompt: int, n_new: int) -> float:
        engine = start(n, n_prompt, n_new)
        run_engine(engine, draw_prompts(n, n_prompt, vocabulary), n_new, options.clock)
        cache = engine._runner.cache
        held = [*model.state_dict().values(), cache.keys, cache.values]
        return memory.peak / sum(tensor.nbytes for tensor in held)

    sizes = [(1, options.prefill, 2), *((n, options.prompt, options.new) for n in batches)]
    share = max(share_of_memory(*size) for size in sizes)
    memory.stop()  # taking samples takes time from the threads

    def measure(n: int, n_prompt: int, n_new: int) -> Any:
        engine = start(n, n_prompt, n_new)
        return median_of(
            lambda prompts: run_engine(engine, prompts, n_new, options.clock),
            lambda: draw_prompts(n, n_prompt, vocabulary),
            options.runs,
        )

    results["prefill_tokens_per_s"] = round(options.prefill / measure(1, options.prefill, 2)[0], 1)
    for n in batches:
        results[f"batch {n}"] = speeds(measure(n, options.prompt, options.new), n, options)
    return {**results, "memory_of_weights_and_cache": round(share, 3)}


def bench_keystroke(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token of a new text, and after a token is put into its end."""
    model, tokenizer = load(folder, dtype="int8")
    gather(model)
    [text] = draw_prompts(1, options.keystroke, model.config.vocab_size)
    engine = Engine.of(model, tokenizer, max_guesses=0, max_batch=1)
    run_engine(engine, [text[:64]], 2, options.clock)
    cold, _ = run_engine(engine, [text], 2, options.clock)
    times = []
    for key in range(300, 303 + options.runs):
        text = [*text[:-20], key, *text[-20:]]
        times.append(run_engine(engine, [text], 2, options.clock)[0])
    warm = statistics.median(times[1:])
    return {"cold_s": cold, "keystroke_s": warm, "ratio": round(cold / warm, 1)}


def bench_transformers(
    folder: Path, batches: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    vocabulary = model.config.vocab_size
    results: dict[str, Any] = {}
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
    dtype = dtype and options.llama_float
    path = Path(options.work) / "model.gguf"
    path.unlink(missing_ok=True)
    convert(folder, path, "gguf", dtype=dtype, quantize=quantize)
    os.sync()  # else it is written while speed is measured
    threads = torch.get_num_threads()
    sizes = (threads, options.prompt, options.prefill, options.new, options.runs)
    vocabulary = ModelConfig.from_hf(json.loads((folder / "config.json").read_text())).vocab_size
    command = [options.llama_python, "-c", LLAMA, str(path), options.clock.__name__]
    command += [*map(str, (*sizes, vocabulary)), options.batches]
    # Its matrix unit's code breaks off in some builds; then with weights as the file has them.
    reasons = ""
    for weights in ("repacked", "as in the file"):
        run = [*command, weights]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if not done.returncode:
            break
        reasons = " | ".join(done.stderr.strip().splitlines()[-12:])
        print(f"llama.cpp, {weights}: status {done.returncode}: {reasons}", file=sys.stderr)
    path.unlink()
    if done.returncode:
        return f"exit status {done.returncode}: {reasons}"
    found = json.loads(done.stdout.splitlines()[-1])
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)]
        for name, times in found.items()
    }
    rate = round(options.prefill / medians.pop("prefill")[0], 1)
    results: dict[str, Any] = {"weights": weights, "prefill_tokens_per_s": rate}
    for name, times in medians.items():
        results[name] = speeds(times, int(name.split()[1]), options)
    return results


def table(results: dict[str, Any], shape: str, config: ModelConfig) -> list[str]:
    """Rows of Markdown: ours, the peers', the ratio, and the share of the machine's limit."""
    found = results[shape]
    rows = []
    for name, ours in found.items():
        if not name.startswith("ours"):
            continue
        precision = name.removeprefix("ours ")
        peer = found.get(f"llama.cpp {GGUF[precision][1] or precision}")
        peer = peer if isinstance(peer, dict) else {}
        others = found.get("Transformers bfloat16", {})
        peak = results["int8_per_s" if precision != "bfloat16" else "bfloat16_per_s"]
        rate = ours["prefill_tokens_per_s"]
        share = 2 * (config.n_params - config.vocab_size * config.hidden_size) * rate / peak
        lines = [("prefill", rate, peer.get("prefill_tokens_per_s"), None, f"{share:.0%} of peak")]
        for batch in (key for key in ours if key.startswith("batch")):
            n = int(batch.split()[1])
            rates = [x.get(batch, {}).get("decode_tokens_per_s") for x in (ours, peer, others)]
            read = ours["weight_bytes"] * rates[0] / n / results["bandwidth_bytes_per_s"]
            lines.append((f"decode, {batch}", *rates, f"{read:.0%} of bandwidth"))
        for what, own, theirs, third, limit in lines:
            ratio = f"{own / theirs:.2f}" if theirs else ""
            rows.append(f"| {shape} {precision}, {what} | {own} | {theirs or ''} | {ratio} | "
                        f"{third or ''} | {limit} |")  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="shipped,15m")
    parser.add_argument("--precisions", default="bfloat16,int8,int4")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--keystroke", type=int, default=0, help="tokens; 0 leaves it out")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--llama-float", default="bfloat16", help="or float16")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-transformers", action="store_true")
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
        "bandwidth_bytes_per_s": bandwidth(options.clock),
        "bfloat16_per_s": products_per_s(torch.bfloat16),
        "int8_per_s": products_per_s(torch.int8),
        "prompt_tokens": options.prompt,
        "prefill_tokens": options.prefill,
        "new_tokens": options.new,
    }
    rows: list[str] = []
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as work:
            options.work = work
            folder = SHIPPED_MODEL if shape == "shipped" else Path(shape)
            if shape in SHAPES:
                folder = Path(work) / "model"
                longest = max(2048, options.keystroke + 64)
                build(folder, SHAPES[shape].replace(max_position_embeddings=longest))
                os.sync()
            config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
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
            if not options.no_peers and not options.no_transformers:
                note("Transformers bfloat16", bench_transformers(folder, batches, options))
            if options.keystroke:
                note("keystroke", bench_keystroke(folder, options))
            rows += table(results, shape, config)
    header = "| work | ours | llama.cpp | ratio | Transformers bfloat16 | share |"
    print("\n".join([header, "|---" * 6 + "|", *rows]), file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
