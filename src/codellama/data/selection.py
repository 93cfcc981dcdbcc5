"""Selection: the staged files of all sources as one table without texts, and what stays of it.

In: staged files. Out: for each of them the rows that are kept, counts for the manifest, and the
signatures that a later corpus compares itself with.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from codellama.artifact import read_manifest
from codellama.data.corpus import KIND, SPLITS
from codellama.data.dedup import KEY_BYTES
from codellama.data.filters import REASONS
from codellama.data.shuffle import Part, row_groups
from codellama.data.sources import Unit
from codellama.data.split import TRAIN, VALIDATION, Fixed, Rows, assign_splits, unit_hash
from codellama.recipe import Corpus, NearDuplicates

EXAMPLES_PER_REASON = 5
pc: Any = pyarrow.compute  # its functions are made at import, unknown to type checkers
SIGNATURES = "signatures.parquet"
_LIGHT = ("repository", "path", "language", "kind", "licence", "reason", "detail", "n_bytes")
_LIGHT += ("key", "sha256", "hits", "redacted")


class Staged(NamedTuple):
    """A unit and the file that it becomes."""

    path: Path
    unit: Unit
    source: int
    """Place of its source in the recipe."""


@dataclass
class Selection:
    """All examined documents in the order of the listing, and what became of each."""

    corpus: Corpus
    table: pa.Table
    split: np.ndarray
    reason: np.ndarray
    stands_for: np.ndarray
    place: np.ndarray
    """Where a row's signature stands."""
    signatures: np.ndarray | None
    parts: list[Part]
    n_other: Counter[str]

    @property
    def n_rows(self) -> int:
        """Files and rows that were examined."""
        return len(self.split)

    @property
    def kept_bytes(self) -> int:
        """Of text."""
        return int(self.table.column("n_bytes").to_numpy()[self.split >= 0].sum())

    def drop_counts(self) -> dict[str, dict[str, Any]]:
        """How many files each reason dropped, in the order of the filters, with a few examples."""
        drops: dict[str, dict[str, Any]] = {}
        for reason in REASONS:
            found = np.flatnonzero(self.reason == reason)
            if len(found):
                # Spread over the list, for neighbours in it are alike.
                some = found[:: -(-len(found) // EXAMPLES_PER_REASON)]
                drops[reason] = {"n": len(found), "examples": [self._name(int(i)) for i in some]}
        return drops

    def _name(self, row: int) -> str:
        def where(row: int) -> str:
            return "/".join(self.table.column(name)[row].as_py() for name in _LIGHT[:2])

        detail = self.table.column("detail")[row].as_py()
        if self.reason[row] == "near duplicate" and self.stands_for[row] >= 0:
            detail = f"like {where(int(self.stands_for[row]))}"
        return f"{where(row)} ({detail})" if detail else where(row)

    def counts(self) -> dict[str, Any]:
        """Documents and bytes by split, source, kind, language and licence; sizes of clusters."""
        table = self.table.append_column("split", pa.array(self.split))
        names = [source.name for source in self.corpus.sources]
        kept = table.filter(pc.greater_equal(table.column("split"), 0))

        def by(column: str) -> dict[Any, dict[str, int]]:
            found = kept.group_by(column).aggregate([("n_bytes", "count"), ("n_bytes", "sum")])
            return {
                row[column]: {"n_documents": row["n_bytes_count"], "n_bytes": row["n_bytes_sum"]}
                for row in found.sort_by(column).to_pylist()
            }

        none = {"n_documents": 0, "n_bytes": 0}
        of_split, of_source = by("split"), by("source")
        n_files = np.bincount(table.column("source").to_numpy(), minlength=len(names))
        repository = self.table.column("repository").to_numpy()
        held = set(repository[self.split == VALIDATION])
        sizes = np.bincount(self.stands_for[self.stands_for >= 0], minlength=1)
        redacted = Counter(pc.list_flatten(kept.column("redacted")).to_pylist())
        return {
            **{key: {n: of_split.get(i, none)[key] for i, n in enumerate(SPLITS)} for key in none},
            "held_out_by": "document" if held & set(repository[self.split == TRAIN]) else "package",
            "held_out": sorted(held),
            "sources": {
                name: {"n_files": int(n_files[i]), **of_source.get(i, none)}
                for i, name in enumerate(names)
            },
            "kinds": by("kind"),
            "languages": by("language"),
            "licences": by("licence"),
            "redacted": dict(sorted(redacted.items())),
            "cluster_sizes": {
                str(size): int(n) for size, n in enumerate(np.bincount(sizes)) if size > 1 and n
            },
        }

    def benchmark_hits(self) -> dict[str, int]:
        """How many documents hold passages of each benchmark."""
        return dict(Counter(pc.list_flatten(self.table.column("hits")).to_pylist()))

    def inputs_digest(self) -> str:
        """Changes whenever something that was read changes the corpus."""
        digest = hashlib.sha256()
        names = [source.name for source in self.corpus.sources]
        for batch in self.table.select(["source", *_LIGHT[:6], "sha256"]).to_batches(4096):
            for row in batch.to_pylist():
                row["source"] = names[row["source"]]
                digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def select(corpus: Corpus, staged: list[Staged], folder: Path) -> Selection:
    """Decide what stays, over all sources and against other corpora.

    folder: takes the rejects if the recipe wants them, and a file of signatures for a while.

    Raises:
        ValueError: one of the other corpora cannot be compared with this one.
    """
    near = corpus.near_duplicates
    fixed, stored = _read_others(corpus.against, near)
    spill = folder / "signatures.tmp"
    with spill.open("wb") as file:
        file.write(stored)
        tables: list[pa.Table] = []
        n_other: Counter[str] = Counter()
        n_signatures = len(fixed.key)
        for number, part in enumerate(staged):
            table, place = _read_light(part, near is not None, n_signatures, file)
            n_signatures += int((place >= 0).sum())
            n_other[part.unit.source] += count_in(part.path, "n_other")
            for name, value in (("source", part.source), ("part", number)):
                table = table.append_column(name, pa.array(np.full(len(table), value, np.int32)))
            table = table.append_column("row", pa.array(np.arange(len(table))))
            tables.append(table.append_column("place", pa.array(place)))
    signatures = None
    if near and n_signatures:
        shape = (n_signatures, near.n_hashes)
        signatures = np.memmap(spill, np.uint32, "r", shape=shape)
    spill.unlink()  # the map keeps it
    table = pa.concat_tables(tables)
    keys = [(name, "ascending") for name in ("source", "repository", "path", "part", "row")]
    table = table.take(pc.sort_indices(table, keys)).combine_chunks()
    place = table.column("place").to_numpy()
    reason = np.array(table.column("reason").to_numpy(), object)
    rows = Rows(
        table.column("source").to_numpy(),
        table.column("repository").to_numpy(),
        reason,
        _keys(table.column("key")),
        table.column("sha256").to_numpy(),
        table.column("n_bytes").to_numpy(),
        place,
    )
    split, stands_for = assign_splits(corpus, rows, signatures, fixed)
    order = np.zeros(len(split))
    for index in np.flatnonzero(split >= 0):
        order[index] = unit_hash(corpus.seed, rows.sha256[index])
    # Of each staged file the places of its rows in the table, in the file's own order.
    back = np.lexsort((table.column("row").to_numpy(), part_of := table.column("part").to_numpy()))
    places = np.split(back, np.searchsorted(part_of[back], np.arange(1, len(staged))))
    parts = [
        Part(s.path, s.unit.source, split[own], order[own])
        for s, own in zip(staged, places, strict=True)
    ]
    if corpus.keep_rejects:
        _write_rejects(parts, [reason[own] for own in places], folder)
    return Selection(corpus, table, split, reason, stands_for, place, signatures, parts, n_other)


def _read_light(part: Staged, near: bool, begin: int, file: Any) -> tuple[pa.Table, np.ndarray]:
    """The columns without texts, and where each row's signature was appended, -1 for none."""
    source = pq.ParquetFile(part.path)
    table = source.read(columns=list(_LIGHT))
    place = np.full(len(table), -1, np.int64)
    kept = pc.is_null(table.column("reason")).to_numpy()
    place[kept] = begin + np.arange(kept.sum())
    if near:
        for group in range(source.num_row_groups):
            column = source.read_row_group(group, columns=["signature"]).column("signature")
            for chunk in column.drop_null().chunks:
                file.write(b"".join(chunk.to_pylist()))
    return table, place


def count_in(path: Path, name: str) -> int:
    """A count that a staged file carries."""
    return int((pq.read_metadata(path).metadata or {}).get(name.encode(), b"0"))


def _keys(column: pa.ChunkedArray) -> np.ndarray:
    """16-byte keys as one numpy array; zeros where there is none."""
    values = b"".join(value or bytes(KEY_BYTES) for value in column.to_pylist())
    return np.frombuffer(values, f"V{KEY_BYTES}")


def _read_others(paths: tuple[str, ...], near: NearDuplicates | None) -> tuple[Fixed, bytes]:
    """Keys and signatures of other corpora."""
    keys, sizes, stored = [np.zeros(0, f"V{KEY_BYTES}")], [np.zeros(0, np.int64)], []
    for path in paths:
        manifest = read_manifest(Path(path), KIND)
        theirs = manifest.get("config", {}).get("near_duplicates")
        if not (Path(path) / SIGNATURES).is_file():
            raise ValueError(f"corpus.against: {path} has no {SIGNATURES}; prepare it again")
        same = ("ngram", "n_hashes")
        if near and (not theirs or any(theirs[name] != getattr(near, name) for name in same)):
            raise ValueError(
                f"corpus.against: {path} was prepared with other settings of near_duplicates "
                f"({theirs}); ngram and n_hashes must agree"
            )
        table = pq.read_table(Path(path) / SIGNATURES)
        keys.append(_keys(table.column("key")))
        sizes.append(table.column("n_bytes").to_numpy())
        if near:
            stored += [b"".join(table.column("signature").to_pylist())]
    return Fixed(np.concatenate(keys), np.concatenate(sizes)), b"".join(stored)


def write_signatures(selection: Selection, folder: Path) -> None:
    """Keys, sizes and signatures of the kept documents, for a later corpus to compare with."""
    kept = np.flatnonzero(selection.split >= 0)
    near = selection.corpus.near_duplicates
    fields = [("key", pa.binary(KEY_BYTES)), ("n_bytes", pa.int64())]
    if near:
        fields.append(("signature", pa.binary(4 * near.n_hashes)))
    schema = pa.schema(fields)
    with pq.ParquetWriter(folder / SIGNATURES, schema, compression="zstd") as writer:
        for begin in range(0, len(kept), 8192):
            some = kept[begin : begin + 8192]
            columns = [selection.table.column(name).take(some) for name in ("key", "n_bytes")]
            if near and selection.signatures is not None:
                values = selection.signatures[selection.place[some]]
                columns.append(pa.array([row.tobytes() for row in values], fields[2][1]))
            writer.write_table(pa.table(columns, schema=schema))


def _write_rejects(parts: list[Part], reasons: list[np.ndarray], folder: Path) -> None:
    """Everything that was dropped, with the beginning of its text, to be read by people."""
    names = ("repository", "path", "detail")
    fields = [(name, pa.string()) for name in ("reason", "source", *names)]
    schema = pa.schema([*fields, ("text", pa.large_string())])
    with pq.ParquetWriter(folder / "rejects.parquet", schema, compression="zstd") as writer:
        for part, reason in zip(parts, reasons, strict=True):
            for found, rows in row_groups(part.path, [*names, "text", "rejected"]):
                why = reason[rows]
                chosen = np.flatnonzero([each is not None for each in why])
                text = pc.coalesce(found.column("rejected"), found.column("text"))
                columns = [
                    pa.array(why[chosen], pa.string()),
                    pa.array([part.source] * len(chosen), pa.string()),
                    *(found.column(name).take(chosen) for name in names),
                    text.take(chosen),
                ]
                writer.write_table(pa.table(columns, schema=schema))
