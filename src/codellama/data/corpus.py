"""The corpus folder: how its shards and manifest are written, checked and read.

It knows the format only, nothing about where documents come from. A corpus folder holds
`manifest.json`, `train-00000.parquet` … and `validation-00000.parquet` …; a row is a document.

In: rows as Arrow tables. Out: `CorpusReader`, texts by index.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from codellama.artifact import read_manifest, sha256_file

KIND = "corpus"
SPLITS = ("train", "validation")
Split = Literal["train", "validation"]

_ABOUT = ("source", "repository", "path", "language", "kind", "licence")
SCHEMA = pa.schema(
    [
        *(("text", pa.large_string()), *((name, pa.string()) for name in _ABOUT)),
        *(("n_bytes", pa.int64()), ("sha256", pa.string()), ("split", pa.string())),
    ]
)

REPEATED: Any = [name for name in _ABOUT if name != "path"] + ["reason", "split"]
"""Columns that get a dictionary; one of texts would cost time and save nothing."""

SHARD_BYTES = 64_000_000  # of text; 15 to 20 MB on disk
ROW_GROUP_BYTES = 1_000_000  # decoded in 2 ms, so that reading one document at random stays cheap
CACHE_BYTES = 1 << 30  # a corpus of this size is decoded once; a larger one is read in order


def repositories_of(corpus: Path) -> Path:
    """Where the corpus of whole repositories lies: beside the one of files."""
    return corpus.with_name(f"{corpus.name}-repositories")


class ShardWriter:
    """Writes the documents of one split, in the order given, into shards of about 64 MB of text."""

    def __init__(self, folder: Path, split: str, shard_bytes: int = SHARD_BYTES) -> None:
        self.shards: list[dict[str, Any]] = []
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._waiting: list[pa.Table] = []
        self._group_bytes = self._written_bytes = self._written_rows = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append documents, in any number at a time: the same ones give the same shards."""
        begin = 0
        for end, n_bytes in enumerate(table.column("n_bytes").to_pylist(), start=1):
            self._group_bytes += n_bytes
            if self._group_bytes >= ROW_GROUP_BYTES:
                self._waiting.append(table.slice(begin, end - begin))
                self._flush()
                begin = end
            if self._written_bytes >= self._shard_bytes:
                self.close()
        self._waiting.append(table.slice(begin))

    def close(self) -> None:
        """Finish the shard that is open and record its rows, size and checksum."""
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        path = self._folder / self._name()
        self.shards.append(
            {
                "file": path.name,
                "split": self._split,
                "rows": self._written_rows,
                "text_bytes": self._written_bytes,
                "file_bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
        )
        self._written_bytes = self._written_rows = 0

    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}.parquet"

    def _flush(self) -> None:
        # In one piece, for where a table is cut changes the bytes that are written.
        table = pa.concat_tables([SCHEMA.empty_table(), *self._waiting]).combine_chunks()
        self._waiting = []
        if not len(table):
            return
        if self._writer is None:
            path = self._folder / self._name()
            self._writer = pq.ParquetWriter(
                path, SCHEMA, compression="zstd", use_dictionary=REPEATED
            )
        self._writer.write_table(table)
        self._written_rows += len(table)
        self._written_bytes += self._group_bytes
        self._group_bytes = 0


def verify_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Compare one shard with its entry in the manifest.

    Raises:
        ValueError: the file is missing, or its size or checksum differs; names it.
    """
    path = folder / shard["file"]
    remedy = "prepare the corpus again"
    if path.parent != folder or not path.is_file():
        raise ValueError(f"{path}: shard is missing; {remedy}")
    if (size := path.stat().st_size) != shard["file_bytes"]:
        raise ValueError(f"{path}: has {size} bytes instead of {shard['file_bytes']}; {remedy}")
    if sha256_file(path) != shard["sha256"]:
        raise ValueError(f"{path}: content is damaged (checksum differs); {remedy}")


class CorpusReader:
    """The documents of one split by index; row groups are decoded when asked for and then kept.

    Reading in order decodes everything once. Not safe for use by several threads at a time. An
    index outside [0, len) raises IndexError.

    Raises:
        ValueError: not a corpus folder, no such split, or a shard is missing or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        split: Split,
        *,
        verify: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """verify: compare all shards with their checksums, about 1 s per GB on disk."""
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(Path(folder), KIND)
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; a corpus has {', '.join(SPLITS)}")
        self._groups: list[tuple[pq.ParquetFile, int]] = []
        """(file, row group) in reading order, and in `_starts` the index of its first document."""
        self._starts: list[int] = []
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes, self._cache_bytes = 0, cache_bytes
        self._n_documents = 0
        for shard in self.manifest["shards"]:
            if shard["split"] == split:
                if verify:
                    verify_shard(self.folder, shard)
                self._add_shard(self.folder / shard["file"])

    @property
    def fingerprint(self) -> str:
        """Changes whenever a document of the corpus, or their order, changes."""
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        return self._n_documents

    def __iter__(self) -> Iterator[str]:
        return (self.text(index) for index in range(len(self)))

    def text(self, index: int) -> str:
        """The text of a document."""
        return self._value(index, "text")

    def sha256(self, index: int) -> str:
        """Hexadecimal SHA-256 of a document's text as UTF-8."""
        return self._value(index, "sha256")

    def column(self, name: str) -> list[Any]:
        """One column of all documents; texts are not read.

        Raises:
            ValueError: a corpus has no such column.
        """
        values: list[Any] = []
        for file, row_group in self._groups:
            if name not in file.schema_arrow.names:
                raise ValueError(f"{self.folder}: the corpus has no column {name!r}; prepare again")
            values += file.read_row_group(row_group, columns=[name]).column(name).to_pylist()
        return values

    def row(self, index: int) -> dict[str, Any]:
        """All columns of a document."""
        group = self._group_of(index)
        file, row_group = self._groups[group]
        table = file.read_row_group(row_group)
        return table.slice(index - self._starts[group], 1).to_pylist()[0]

    def _add_shard(self, path: Path) -> None:
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path}: not a readable shard: {error}") from None
        for group in range(file.num_row_groups):
            self._groups.append((file, group))
            self._starts.append(self._n_documents)
            self._n_documents += file.metadata.row_group(group).num_rows

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} ({self.split})")
        return bisect_right(self._starts, index) - 1

    def _value(self, index: int, column: str) -> str:
        group = self._group_of(index)
        table = self._cache.get(group)
        if table is None:
            file, row_group = self._groups[group]
            table = file.read_row_group(row_group, columns=["text", "sha256"])
            self._cache[group] = table
            self._cached_bytes += table.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        else:
            self._cache.move_to_end(group)
        return table.column(column)[index - self._starts[group]].as_py()


def random_documents(folder: Path, n: int = 3, n_chars: int = 600) -> dict[str, str]:
    """The beginnings of some documents to train on, by where they come from; others each time."""
    reader = CorpusReader(folder, "train", verify=False)
    rows = [reader.row(index) for index in random.sample(range(len(reader)), min(n, len(reader)))]
    return {f"{row['repository']}/{row['path']}": row["text"][:n_chars] for row in rows}


corpus_documents = CorpusReader  # opens one split of a corpus, all shards checked
