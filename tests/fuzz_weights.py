"""Loads thousands of damaged models; run by test_fuzz.py in a process of its own.

    python fuzz_weights.py FOLDER N_CASES SEED

Last line of output: one JSON object with the counts, the slowest load and the growth of memory.
Accepted outcomes are a model and a ValueError of one line that names the folder.
"""

import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from any_weights import SMALL, random_model, write_folder
from codellama.weights import convert, load

torch.set_num_threads(1)
EXTREMES = [0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 10**9]
JSON_VALUES = [*EXTREMES, -(2**63), 1e308, 1e-320, float("nan"), float("inf"), "", "../x", "/etc"]
JSON_VALUES += ["model.safetensors", None, True, [], {}, [[]], {"a": 1}, 10**400, "\ud800", "\0"]


def models(folder: Path) -> dict[str, Path]:
    """One model in every format."""
    shape = SMALL.replace(hidden_size=32, intermediate_size=32)
    hf = write_folder(folder / "hf", shape, "bfloat16")
    convert(hf, folder / "parts", "hf", max_shard_bytes=30_000)
    old = shutil.copytree(hf, folder / "old")
    (old / "model.safetensors").unlink()
    torch.save(dict(random_model(shape).bfloat16().state_dict()), old / "pytorch_model.bin")
    convert(hf, folder / "meta", "meta", n_shards=2)
    convert(hf, folder / "q8.gguf", "gguf", quantize="q8_0")
    return {name: folder / name for name in ("hf", "parts", "old", "meta", "q8.gguf")}


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or insert; more often near the ends, where directories are."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        n = len(out)
        if n < 16:
            break
        near = rng.choice([64, 1024, 8192, n])
        at = (
            rng.randrange(min(near, n))
            if rng.random() < 0.6
            else n - 1 - rng.randrange(min(near, n))
        )
        match rng.randrange(8):
            case 0 | 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 3:
                value = rng.choice([*EXTREMES, n, n + 1, n - 1]) % 2**64
                size = rng.choice([2, 4, 8])
                out[at : at + size] = struct.pack("<Q", value)[:size]
            case 4:
                del out[at : at + rng.choice([1, 7, 8, 100, n])]
            case 5:
                length = rng.choice([1, 8, 64, 4096])
                other = rng.randrange(n)
                out[at : at + length] = out[other : other + length]
            case 6:
                out[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
            case 7:
                out[at : at + rng.choice([8, 512])] = bytes(8)
    return bytes(out)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove or rename some value at any depth."""
    value = json.loads(data)
    if isinstance(value, dict):
        for _ in range(rng.choice([1, 1, 3])):
            inner = value
            while True:
                keys = list(inner) if isinstance(inner, dict) else range(len(inner))
                if not keys:
                    break
                chosen = rng.choice(list(keys))
                if isinstance(inner[chosen], (dict, list)) and inner[chosen] and rng.random() < 0.8:
                    inner = inner[chosen]
                    continue
                if isinstance(inner, dict) and rng.random() < 0.2:
                    inner[rng.choice(["", "x", chosen + "2"])] = inner.pop(chosen)
                else:
                    inner[chosen] = rng.choice(JSON_VALUES)
                break
    text = json.dumps(value)
    return text.encode() if rng.random() < 0.95 else b"[" * 100_000 + text.encode()


def mutated(path: Path, data: bytes, rng: random.Random) -> bytes:
    """Damage one file by its kind."""
    if path.suffix == ".json" and rng.random() < 0.8:
        return mutated_json(data, rng)
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        length = struct.unpack("<Q", data[:8])[0]
        header = mutated_json(data[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return mutated_bytes(data, rng)


def main(folder: Path, n_cases: int, seed: int) -> None:
    rng = random.Random(seed)
    sources = models(folder / "sources")
    case = folder / "cases" / "case"
    for source in sources.values():
        load(source)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest = 0.0
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(n_cases):
        name = rng.choice(list(sources))
        source = sources[name]
        target = case.with_suffix(source.suffix)
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            # What loading never reads is left out; untouched files are linked.
            files = [p for p in source.iterdir() if p.name not in ("tokenizer.json",)]
            weights = [p for p in files if p.suffix in (".safetensors", ".pth", ".bin")]
            victim = rng.choice(weights if rng.random() < 0.6 else files)
            for path in files:
                if path != victim:
                    os.link(path, target / path.name)
            (target / victim.name).write_bytes(mutated(victim, victim.read_bytes(), rng))
        else:
            victim = source
            target.unlink(missing_ok=True)
            target.write_bytes(mutated(source, source.read_bytes(), rng))
        start = time.process_time()  # not the wall clock: other work may run beside
        kind = f"{name}/{victim.name}"
        try:
            load(target, dtype=rng.choice(["bfloat16", "float32", "int8"]))
            outcomes["loaded"] += 1
        except ValueError as error:
            outcomes["refused"] += 1
            message = str(error)
            if "\n" in message or str(target) not in message or len(message) > 1000:
                failures.append(f"case {i} {kind}: unclear message {message[:300]!r}")
        except BaseException as error:  # noqa: BLE001  (any other exception is the finding)
            failures.append(f"case {i} {kind}: {type(error).__name__}: {str(error)[:300]}")
        slowest = max(slowest, time.process_time() - start)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    beside = sorted(path.name for path in (folder / "cases").iterdir())
    result = {"cases": n_cases, **outcomes, "failures": failures[:20], "n_failures": len(failures)}
    result |= {"slowest_s": round(slowest, 3), "growth_bytes": growth * 1024}
    print(json.dumps(result | {"largest_file_bytes": largest, "beside": beside}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
