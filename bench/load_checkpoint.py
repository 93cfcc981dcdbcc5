"""Loading and converting a checkpoint of the 7B shape, beside a plain copy of its files.

    .venv/bin/python bench/load_checkpoint.py [--model 7b] [--layers 32] [--folder /tmp]

Random weights in bfloat16 are written to a temporary folder (13.5 GB for 7b; three times that must
be free) and read once, so that the page cache is warm where memory allows. Then, each in a process
of its own: a copy of the files, conversions to GGUF and Meta's layout, and loading in bfloat16 and
int8 with a few decoded tokens. Copying and converting end with an fsync. "Anonymous" is the peak of
memory that no file backs (RssAnon), sampled every 5 ms. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from codellama.model.config import ModelConfig
from codellama.model.convert import Reader, write_hf
from codellama.model.source import Stored, Weights, tensor_shapes
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.model_file import BYTE, CONTROL, UNKNOWN, ModelFile, Piece
from codellama.tokenizer.variants import INFILLING_PIECES
from codellama.weights import convert, load

N_DECODED = 3
BYTES_PER_VALUE = 2  # bfloat16


def vocabulary(n_pieces: int) -> Tokenizer:
    """A tokenizer of the right size; its pieces do not matter."""
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [Piece(f"▁w{i}", -float(i)) for i in range(n_pieces - 259 - 4)]
    pieces += [Piece(text, 0.0, CONTROL) for text in INFILLING_PIECES]
    return Tokenizer(ModelFile(tuple(pieces)))


def build(folder: Path, config: ModelConfig) -> None:
    """Write random weights, made one tensor at a time from one block of random numbers."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        n_bytes = torch.Size(shape).numel() * BYTES_PER_VALUE
        tensors[name] = Stored(shape, torch.bfloat16, "bfloat16", n_bytes, "random")

    def read(name: str, dtype: torch.dtype | None) -> torch.Tensor:
        n_values = torch.Size(tensors[name].shape).numel()
        if len(tensors[name].shape) == 1:
            return torch.ones(n_values, dtype=torch.bfloat16)
        return block.repeat(-(-n_values // block.numel()))[:n_values].view(tensors[name].shape)

    weights = Weights("hf", folder, config, tensors, read, {})
    write_hf(Reader(weights), folder, vocabulary(config.vocab_size).save)


class Memory:
    """Samples this process's memory until it is stopped; bytes above the start."""

    def __init__(self) -> None:
        self._start, self.peak, self._stop = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes() - self._start)

    def stop(self) -> dict[str, int]:
        self._stop.set()
        self._thread.join()
        now = anonymous_bytes() - self._start
        return {"anonymous_peak_bytes": max(self.peak, now), "anonymous_end_bytes": now}


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def copy_files(source: Path, target: Path) -> None:
    """Copy a folder by reading and writing, and flush it."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as old, (target / path.name).open("wb") as new:
            shutil.copyfileobj(old, new, 16 << 20)
            new.flush()
            os.fsync(new.fileno())


def measure(what: str, source: Path, target: Path) -> dict[str, Any]:
    """One measurement, in this process."""
    memory = Memory()
    start = time.perf_counter()
    result: dict[str, Any] = {}
    model = None
    if what == "copy":
        copy_files(source, target)
    elif what in ("gguf", "meta"):
        convert(source, target, what)
    elif what in ("q8_0", "q4_0"):
        convert(source, target, "gguf", quantize=what)
    else:
        model, _ = load(source, dtype=what)
    result["seconds"] = round(time.perf_counter() - start, 2)
    result |= memory.stop()
    if model is not None:
        tokens = torch.tensor([[1]])
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(N_DECODED):
                logits = model(tokens)
                assert bool(logits.isfinite().all())
        result["seconds_per_token"] = round((time.perf_counter() - start) / N_DECODED, 3)
    return result


def in_a_process(what: str, source: Path, target: Path) -> dict[str, Any]:
    """One measurement, in a process of its own; what it wrote is removed."""
    command = [sys.executable, __file__, "--measure", what, str(source), str(target)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    print(what, output.strip(), file=sys.stderr)
    return json.loads(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, source, target = arguments.measure
        print(json.dumps(measure(what, Path(source), Path(target))))
        return
    config = ModelConfig.named(arguments.model)
    if arguments.layers:
        config = config.replace(num_hidden_layers=arguments.layers)
    weight_bytes = config.n_params * BYTES_PER_VALUE
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        build(source, config)
        results: dict[str, Any] = {}
        # Loading first, then writing, which may push the source out of the page cache.
        for what in ("warm up", "bfloat16", "int8", "copy", "gguf", "meta", "copy again", "q8_0"):
            if what == "warm up":
                in_a_process("bfloat16", source, target)
                continue
            results[what] = in_a_process(what.split()[0], source, target)
    copy_s = min(results["copy"]["seconds"], results["copy again"]["seconds"])
    summary = {
        "model": arguments.model,
        "layers": config.num_hidden_layers,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "weight_bytes": weight_bytes,
        "load_bfloat16_peak_ratio": results["bfloat16"]["anonymous_peak_bytes"] / weight_bytes,
        "load_int8_peak_ratio": results["int8"]["anonymous_peak_bytes"] / weight_bytes,
        "gguf_to_copy_time_ratio": results["gguf"]["seconds"] / copy_s,
        "meta_to_copy_time_ratio": results["meta"]["seconds"] / copy_s,
        **results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
