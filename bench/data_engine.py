"""The data engine: MB/s from archives and trees to a corpus, by step, and peak memory by size.

    python bench/data_engine.py FOLDER_OF_WHEELS [--megabytes 500] [--full]

Reads Python out of real wheels (repeated under other names, with every tenth word changed, where
there is less than asked for), filters, finds exact and near duplicates, writes Parquet. --full adds
parsing and the detection of secrets. Then each step alone in one process. The last line is one
JSON object. Peers are in near_duplicates.py and secret_recall.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from codellama.data import staging
from codellama.data.dedup import normalised_key
from codellama.data.filters import judge_text, parses
from codellama.data.listing import list_sources
from codellama.data.near_dedup import representatives, signatures
from codellama.data.prepare import prepare_corpus
from codellama.data.secrets import redact
from codellama.data.sources import read_unit
from codellama.recipe import Corpus, Filters, NearDuplicates, Recipe, Source

SAMPLE_BYTES = 30_000_000  # of text, for the steps alone


def make_recipe(work: Path, sources: list[dict[str, Any]], full: bool) -> Recipe:
    filters = {"permissive_only": False, "parse_python": full, "redact": full}
    corpus = {"sources": sources, "filters": filters, "near_duplicates": {}}
    stage = {"steps": 1, "batch_tokens": 512, "micro_batch": 1, "peak_lr": 1e-3}
    fields = {"name": "bench", "work": str(work), "corpus": corpus, "model": {"name": "tiny"}}
    return Recipe.model_validate({**fields, "stages": {"code": stage}})


def texts(folder: Path) -> Iterator[str]:
    """Python files of all wheels, at most 1 MB each."""
    source = Source(name="wheels", kind="archive", path=f"{folder}/*.whl")
    for unit in list_sources((source,), folder).units:
        for document in read_unit(unit, source, 1_000_000):
            if document.reason is None and 100 < len(document.content) <= 1_000_000:
                yield document.content.decode("utf-8", "replace")


def write_tree(folder: Path, root: Path, n_bytes: int) -> int:
    """Real files, then edited copies of them, as one tree of many small files."""
    written, turn = 0, 0
    while written < n_bytes:
        for number, text in enumerate(texts(folder)):
            if turn:
                words = text.split(" ")
                words[::10] = [f"{word}{turn}" for word in words[::10]]
                text = " ".join(words)
            path = root / f"r{turn}-{number // 500}" / f"f{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = text.encode("utf-8", "replace")
            path.write_bytes(content)
            written += len(content)
            if written >= n_bytes:
                break
        turn += 1
    return written


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
        while not self._ended.wait(0.5):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def cpu_s(work: Callable[[], Any]) -> float:
    """Processor time of all threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def steps(sample: list[str]) -> dict[str, float]:
    """MB/s and core of each step alone, by processor time."""
    n_bytes = sum(len(text.encode()) for text in sample)
    near, off = NearDuplicates(), Filters(permissive_only=False, parse_python=False)
    found = signatures(sample, near)
    work: dict[str, Callable[[], Any]] = {
        "filters": lambda: [judge_text(text, off) for text in sample],
        "parse": lambda: [parses(text) for text in sample],
        "secrets": lambda: [redact(text) for text in sample],
        "exact key": lambda: [normalised_key(text) for text in sample],
        "signature": lambda: signatures(sample, near),
        "cluster": lambda: representatives(found, found[:, 0] * 0, found[:, 0] * 0 + 1, near),
    }
    return {name: round(n_bytes / 1e6 / cpu_s(run), 1) for name, run in work.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        n_bytes = write_tree(options.wheels, root / "tree", options.megabytes * 1_000_000)
        recipe = make_recipe(
            root / "work", [{"name": "tree", "path": str(root / "tree")}], options.full
        )
        begin = time.perf_counter()
        with PeakMemory() as memory:
            folder = prepare_corpus(recipe)
        wall_s = time.perf_counter() - begin
        manifest = json.loads((folder / "manifest.json").read_text())
    sample: list[str] = []
    n_sampled = 0
    for text in texts(options.wheels):
        sample.append(text)
        n_sampled += len(text)
        if n_sampled > SAMPLE_BYTES:
            break
    result = {
        "input_mb": round(n_bytes / 1e6),
        "wall_s": round(wall_s, 1),
        "mb_per_s": round(n_bytes / 1e6 / wall_s, 1),
        "peak_memory_mb": round(memory.peak_bytes / 1e6),
        "own_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "full": options.full,
        "n_documents": sum(manifest["n_documents"].values()),
        "dropped": {reason: drop["n"] for reason, drop in manifest["dropped"].items()},
        "steps_mb_per_core_s": steps(sample),
        "version": staging.VERSION,
    }
    assert isinstance(recipe.corpus, Corpus)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
