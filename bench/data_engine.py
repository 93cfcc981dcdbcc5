"""The data engine: MB/s and peak memory of whole runs by size, and the rate of each step alone.

    python bench/data_engine.py PLACE ... --megabytes 500 1000 2000 [--full] [--write FILE.md]

A place is an archive or a folder of them, such as wheels and Debian's source packages. Their files
of code are unpacked once; each run reads an even sample of them as a tree of small files, finds
exact and near duplicates and writes a corpus, in a process of its own. --full makes a second run
of each size with parsing and the detection of secrets. Before it, each step alone in one process.
--write puts the tables into a file. The last line is one JSON object. Peers are in
near_duplicates.py and secret_recall.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from codellama.data.dedup import normalised_key
from codellama.data.filters import judge_text, parses
from codellama.data.listing import list_sources
from codellama.data.near_dedup import representatives, signatures
from codellama.data.prepare import prepare_corpus
from codellama.data.secrets import redact
from codellama.data.sources import read_unit
from codellama.recipe import Filters, NearDuplicates, Recipe, Source

SAMPLE_BYTES = 30_000_000  # of text, for the steps alone
FOLDER_FILES = 500


def make_recipe(work: Path, tree: Path, full: bool) -> Recipe:
    filters = {"permissive_only": False, "parse_python": full, "redact": full}
    source = {"name": "tree", "path": str(tree), "languages": ["all"]}
    corpus = {"sources": [source], "filters": filters, "near_duplicates": {}}
    stage = {"steps": 1, "batch_tokens": 512, "micro_batch": 1, "peak_lr": 1e-3}
    fields = {"name": "bench", "work": str(work), "corpus": corpus, "model": {"name": "tiny"}}
    return Recipe.model_validate({**fields, "stages": {"code": stage}})


def documents(places: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all files of code in the archives, of 100 bytes to 1 MB."""
    for place in places:
        source = Source(name="a", kind="archive", path=str(place), languages=("all",))
        for unit in list_sources((source,), place).units:
            for document in read_unit(unit, source, 1_000_000):
                if document.reason is None and 100 < len(document.content) <= 1_000_000:
                    yield f"{unit.name}/{document.path}", document.content


def unpack(places: list[Path], pool: Path) -> list[tuple[Path, int]]:
    """Write every file once; returns paths and sizes in an order that mixes all archives."""
    found: list[tuple[int, Path, int]] = []
    for number, (name, content) in enumerate(documents(places)):
        path = pool / str(number // FOLDER_FILES) / f"{number}-{Path(name).name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        found.append((zlib.crc32(name.encode()), path, len(content)))
    return [(path, size) for _, path, size in sorted(found)]


def link_tree(files: list[tuple[Path, int]], tree: Path, n_bytes: int) -> int:
    """A tree of the first files, as many as have the given size together; returns their size."""
    linked = 0
    for number, (path, size) in enumerate(files):
        if linked >= n_bytes:
            break
        target = tree / f"r{number // FOLDER_FILES}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
        linked += size
    return linked


class PeakMemory:
    """Peak of the proportional memory of this process and its children, sampled."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(1.0):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def processor_s() -> float:
    """Processor time of this process and its children, of which those that ended count, too."""
    own = psutil.Process()
    times = [process.cpu_times() for process in [own, *own.children(recursive=True)]]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def measure(tree: Path, work: Path, n_bytes: int, full: bool) -> dict[str, Any]:
    """One whole run."""
    cpu, begin = processor_s(), time.perf_counter()
    with PeakMemory() as memory:
        folder = prepare_corpus(make_recipe(work, tree, full))
        wall_s, cpu_s = time.perf_counter() - begin, processor_s() - cpu
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        "input_mb": round(n_bytes / 1e6),
        "full": full,
        "wall_s": round(wall_s, 1),
        "mb_per_s": round(n_bytes / 1e6 / wall_s, 1),
        "processor_s": round(cpu_s, 1),
        "mb_per_processor_s": round(n_bytes / 1e6 / cpu_s, 1),
        "peak_memory_mb": round(memory.peak_bytes / 1e6),
        "n_files": manifest["inputs"]["n_files"],
        "n_documents": sum(manifest["n_documents"].values()),
        "python_share": round(manifest["languages"]["python"]["n_bytes"] / n_bytes, 2),
        "dropped": {reason: drop["n"] for reason, drop in manifest["dropped"].items()},
    }


def cpu_s(work: Callable[[], Any]) -> float:
    """Processor time of all threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def steps(files: list[tuple[Path, int]]) -> dict[str, float]:
    """MB/s and core of each step alone, by processor time, over Python files."""
    sample: list[str] = []
    n_bytes = 0
    for path, size in files:
        if path.suffix == ".py" and n_bytes < SAMPLE_BYTES:
            sample.append(path.read_bytes().decode("utf-8", "replace"))
            n_bytes += size
    near, off = NearDuplicates(), Filters(permissive_only=False, parse_python=False)
    found = signatures(sample, near)
    work: dict[str, Callable[[], Any]] = {
        "filters": lambda: [judge_text(text, off) for text in sample],
        "parsing": lambda: [parses(text) for text in sample],
        "secrets": lambda: [redact(text) for text in sample],
        "exact keys": lambda: [normalised_key(text) for text in sample],
        "MinHash signatures": lambda: signatures(sample, near),
        "clusters": lambda: representatives(found, found[:, 0] * 0, found[:, 0] * 0 + 1, near),
    }
    return {name: round(n_bytes / 1e6 / cpu_s(run), 1) for name, run in work.items()}


def report(runs: list[dict[str, Any]], rates: dict[str, float]) -> str:
    """Both tables as Markdown."""
    columns = ("input_mb", "wall_s", "mb_per_s", "processor_s", "mb_per_processor_s")
    columns += ("peak_memory_mb", "n_files", "n_documents", "python_share")
    lines = [
        f"Made by `bench/data_engine.py` on {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f} at its end, Python {platform.python_version()}.",
        "",
        f"| parsing and secrets | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for run in runs:
        values = [str(run[name]) for name in columns]
        lines.append(f"| {'yes' if run['full'] else 'no'} | {' | '.join(values)} |")
    lines += ["", "| step alone | MB/s and core |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {rate} |" for name, rate in rates.items())]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        files = unpack(options.places, Path(name, "pool"))
        n_there = sum(size for _, size in files) / 1e6
        if n_there < max(options.megabytes):
            raise SystemExit(f"only {n_there:.0f} MB of code in these places")
        rates = steps(files)
        for size in options.megabytes:
            tree = Path(name, f"tree{size}")
            n_bytes = link_tree(files, tree, size * 1_000_000)
            for full in [False, True] if options.full else [False]:
                with (
                    tempfile.TemporaryDirectory(dir=name) as work,
                    ProcessPoolExecutor(1, mp_context=spawn) as process,
                ):
                    runs.append(process.submit(measure, tree, Path(work), n_bytes, full).result())
    text = report(runs, rates)
    print(text)
    if options.write:
        options.write.write_text(f"# Whole runs of the data engine\n\n{text}", encoding="utf-8")
    print(json.dumps({"runs": runs, "steps_mb_per_core_s": rates}))


if __name__ == "__main__":
    main()
