"""Shuffling: the kept documents of many files into shards, in the order of their hashes.

Readers that go in order then meet all sources evenly. The texts pass through buckets on disk, each
of a range of hashes and small enough to be sorted in memory.

In: staged files and, for each row, its split and hash. Out: shards in a corpus folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from codellama.data.corpus import SCHEMA, SPLITS, ShardWriter

pc: Any = pyarrow.compute  # its functions are made at import, unknown to type checkers
BUCKET_BYTES = 128_000_000  # of text; sorting one takes twice this
BUFFER_BYTES = 32_000_000  # of text, for all buckets together
FIELDS = ("repository", "path", "language", "kind", "licence", "n_bytes", "sha256", "text")


class Part(NamedTuple):
    """What is kept of one staged file."""

    path: Path
    source: str
    split: np.ndarray
    """For each row -1 or the index of its split."""
    order: np.ndarray
    """For each row a number in [0, 1)."""


def row_groups(path: Path, columns: Sequence[str]) -> Iterator[tuple[pa.Table, slice]]:
    """The row groups of a file and which of its rows they are; one is in memory at a time."""
    file, begin = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=list(columns))
        yield table, slice(begin, begin + len(table))
        begin += len(table)


def write_shards(
    parts: list[Part], n_bytes: int, folder: Path, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Write all kept documents and return what the manifest says of the shards.

    n_bytes: of all kept texts. advance: called with the number of rows that were read.
    """
    n_buckets = max(1, -(-n_bytes // BUCKET_BYTES))
    spill = folder / "spill"
    spill.mkdir()
    _spill(parts, n_buckets, spill, advance)
    shards: list[dict[str, Any]] = []
    for number, split in enumerate(SPLITS):
        writer = ShardWriter(folder, split)
        for bucket in range(n_buckets):
            for table in _sorted(spill / f"{number * n_buckets + bucket}.arrow", split):
                writer.add(table)
        writer.close()
        shards += writer.shards
    shutil.rmtree(spill)
    return shards


_SPILLED = SCHEMA.remove(SCHEMA.get_field_index("split")).append(pa.field("order", pa.float64()))


def _spill(parts: list[Part], n_buckets: int, spill: Path, advance: Callable[[int], None]) -> None:
    """Read everything once and append each kept document to its bucket."""
    waiting: dict[int, list[pa.Table]] = {}
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    n_waiting = 0
    options = pa.ipc.IpcWriteOptions(compression="lz4")

    def flush() -> None:
        for name, tables in waiting.items():
            if name not in writers:
                writers[name] = pa.ipc.new_file(f"{spill}/{name}.arrow", _SPILLED, options=options)
            writers[name].write_table(pa.concat_tables(tables))
        waiting.clear()

    for part in parts:
        if (part.split < 0).all():
            advance(len(part.split))
            continue
        for table, rows in row_groups(part.path, FIELDS):
            split, order = part.split[rows].astype(np.int64), part.order[rows]
            names = split * n_buckets + np.minimum((order * n_buckets).astype(int), n_buckets - 1)
            chosen = np.argsort(names, kind="stable")
            chosen = chosen[split[chosen] >= 0]
            kept = table.take(chosen).append_column("order", pa.array(order[chosen]))
            kept = kept.append_column("source", pa.repeat(part.source, len(chosen)))
            kept = kept.select(_SPILLED.names)
            found, begins, counts = np.unique(names[chosen], return_index=True, return_counts=True)
            for name, begin, count in zip(found, begins, counts, strict=True):
                waiting.setdefault(int(name), []).append(kept.slice(begin, count))
            n_waiting += kept.nbytes
            if n_waiting >= BUFFER_BYTES:
                flush()
                n_waiting = 0
            advance(table.num_rows)
    flush()
    for writer in writers.values():
        writer.close()


def _sorted(path: Path, split: str) -> Iterator[pa.Table]:
    """The documents of a bucket in their order, with the columns of a corpus."""
    if not path.exists():
        return
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all().combine_chunks()
    indices = pc.sort_indices(table, [("order", "ascending"), ("sha256", "ascending")])
    table = table.append_column("split", pa.repeat(split, len(table))).select(SCHEMA.names)
    for begin in range(0, len(indices), 1024):
        yield table.take(indices.slice(begin, 1024))
