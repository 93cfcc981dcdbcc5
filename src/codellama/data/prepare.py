"""Prepare: from the sources that a recipe names to a corpus folder.

sources -> Daft dataframe -> filters -> exact duplicates -> split -> Parquet shards and a manifest.
It trains no tokenizer and makes no batches. The folder is written beside its final place and then
renamed, so a corpus that exists is whole; the same inputs give the same bytes.

In: a `Recipe`. Out: `recipe.corpus_dir`, in the format that `corpus` describes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq
from daft import DataType, col
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from codellama.data.corpus import FORMAT_VERSION, KIND, SPLITS, ShardWriter, read_manifest
from codellama.data.dedup import mark_duplicates, normalised_key
from codellama.data.filters import REASONS, judge_bytes, judge_path
from codellama.data.sources import Listing, list_sources, normalised_name, read_file
from codellama.recipe import Corpus, Filters, Recipe

EXAMPLES_PER_REASON = 5
IN_PROCESS_FILES = 2000  # fewer are done before worker processes have started (2 s)
BATCH_FILES = 128  # about 1 MB of text: what a worker holds, and how often the bar moves


def prepare_corpus(recipe: Recipe) -> Path:
    """Write the corpus of a recipe and return its folder; a corpus that is up to date is kept.

    Raises:
        ValueError: a source is missing, nothing is left after the filters, or another process
            is writing the same corpus.
        OSError: the corpus could not be written; what was there before is untouched.
    """
    folder = recipe.corpus_dir
    console = Console(stderr=True)
    with _only_writer(folder):
        with console.status("listing sources …"):
            listing = list_sources(recipe.corpus.sources, recipe.work / "sources")
        identity = _identity(recipe.corpus, listing)
        if _is_current(folder, identity):
            console.print(f"{folder}: up to date, nothing to do")
            return folder
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            manifest = _build(recipe.corpus, listing, identity, partial, console)
            _write_whole(partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            _swap(partial, folder)
        except (OSError, daft.exceptions.DaftCoreException) as error:
            raise OSError(f"{folder}: could not write the corpus: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    _report(manifest, folder, console)
    return folder


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder above the corpus locked, and undo a swap that was cut short."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is preparing this corpus") from None
        previous = folder.with_name(folder.name + ".previous")
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _swap(partial: Path, folder: Path) -> None:
    """Put the new folder in the place of the old one; the old one is deleted last."""
    previous = folder.with_name(folder.name + ".previous")
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _identity(corpus: Corpus, listing: Listing) -> dict[str, Any]:
    """Everything that decides what the corpus is: equal identities give equal corpora."""
    digest = hashlib.sha256()
    for file in listing.files:
        fields = (file.source, file.repository, file.path, file.licence, file.size, file.crc)
        digest.update(json.dumps(fields).encode() + b"\n")
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "code_version": metadata.version("codellama"),
        "python": ".".join(platform.python_version_tuple()[:2]),  # decides what parses
        "config": corpus.model_dump(mode="json"),
        "inputs": {
            "n_files": len(listing.files),
            "sha256": digest.hexdigest(),
            "archives": sorted(listing.archives),
            "unavailable": dict(sorted(listing.unavailable.items())),
        },
    }


def _is_current(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds the corpus of this identity, all shards present."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    sizes = {shard["file"]: shard["file_bytes"] for shard in manifest["shards"]}
    there = {file.name: file.stat().st_size for file in folder.glob("*.parquet")}
    return sizes == there and all(manifest.get(key) == identity[key] for key in identity)


_EXAMINED = DataType.struct(
    {
        "text": DataType.string(),
        "reason": DataType.string(),
        "key": DataType.string(),
        "n_bytes": DataType.int64(),
        "sha256": DataType.string(),
    }
)


def _examine(
    path: str, licence: str, location: bytes, member: str, size: int, filters: Filters
) -> dict[str, Any]:
    """One row of the corpus, or the reason why there is none; runs in Daft's workers."""
    text, content = None, b""
    reason = judge_path(path, licence, filters)
    if not reason and size > filters.max_bytes:
        reason = "too large"
    if not reason:
        try:
            content = read_file(location, member, filters.max_bytes)
        except OSError:
            reason = "unreadable"
    if not reason:
        verdict = judge_bytes(content, filters)
        text, reason = verdict.text, verdict.reason
    key = sha256 = None
    if text is not None:
        content = text.encode()
        key, sha256 = normalised_key(text), hashlib.sha256(content).hexdigest()
    return {
        "text": text,
        "reason": reason,
        "key": key,
        "n_bytes": len(content) if text is not None else 0,
        "sha256": sha256,
    }


def _build(
    corpus: Corpus, listing: Listing, identity: dict[str, Any], folder: Path, console: Console
) -> dict[str, Any]:
    """Write shards into the folder and return the manifest."""
    # Texts pass through a file, so that duplicates are found on their keys alone.
    staged = folder / "staged.parquet"
    columns = ("source", "repository", "path", "licence", "n_bytes", "reason", "key", "sha256")
    small: dict[str, list[Any]] = {name: [] for name in columns}
    with _progress(console) as progress:
        task = progress.add_task("reading and filtering", total=len(listing.files))
        for table in _stage(listing, corpus.filters, staged):
            for name in columns:
                small[name] += table.column(name).to_pylist()
            progress.advance(task, table.num_rows)
    split = assign_splits(corpus, small)
    kept = [index for index, name in enumerate(split) if name is not None]
    drops = _drop_counts(small)
    if not kept:
        counts = ", ".join(f"{reason}: {drop['n']}" for reason, drop in drops.items())
        raise ValueError(
            f"the corpus is empty: of {len(listing.files)} files none was kept ({counts or 'no files'})"
        )
    if "train" not in split:
        raise ValueError("corpus.hold_out names every package: nothing is left to train on")
    shards = _write_shards(staged, kept, split, small, corpus.seed, folder, console)
    staged.unlink()
    return _manifest(identity, listing, small, split, drops, shards)


def _stage(listing: Listing, filters: Filters, staged: Path) -> Iterator[pa.Table]:
    """Examine all files, write the rows to a Parquet file, and yield them batch by batch."""
    fields = ("source", "repository", "path", "licence", "location", "member", "size")
    frame = daft.from_pydict(
        {"id": list(range(len(listing.files)))}
        | {name: [getattr(file, name) for file in listing.files] for name in fields}
    )
    examine = daft.func(
        _examine,
        return_dtype=_EXAMINED,
        unnest=True,
        use_process=len(listing.files) >= IN_PROCESS_FILES,
    )
    inputs = [col(name) for name in ("path", "licence", "location", "member", "size")]
    rows = frame.into_batches(BATCH_FILES).select(
        *(col(name) for name in ("id", "source", "repository", "path", "licence")),
        examine(*inputs, filters),
    )
    writer, expected = None, 0
    for batch in rows.to_arrow_iter():
        table = pa.Table.from_batches([batch])
        first = table.column("id")[0].as_py()
        assert first == expected, "Daft keeps the order of rows"
        expected += table.num_rows
        if writer is None:
            writer = pq.ParquetWriter(staged, table.schema, compression="zstd", compression_level=1)
        writer.write_table(table)
        yield table
    if writer is not None:
        writer.close()


def assign_splits(corpus: Corpus, rows: dict[str, list[Any]]) -> list[str | None]:
    """Decide `train`, `validation` or None (dropped) for each row, and mark duplicates as such.

    Whole packages are held out. Of documents with equal normalised text one stays: the one of a
    held-out package first, so that what is validated on is never trained on, then the one of the
    earlier source. Without any held-out document, single documents are held out by their hash.
    rows: columns `repository`, `reason`, `key`, `sha256`; reasons of duplicates are filled in.
    """
    held = {name: _is_held_out(corpus, name) for name in set(rows["repository"])}
    n_rows = len(rows["reason"])
    ids = [index for index in range(n_rows) if rows["reason"][index] is None]
    if not ids:
        return [None] * n_rows
    order = [index + (0 if held[rows["repository"][index]] else n_rows) for index in ids]
    frame = daft.from_pydict({"id": ids, "order": order, "key": [rows["key"][i] for i in ids]})
    marked = mark_duplicates(frame).where(col("is_duplicate")).select("id").to_pydict()
    split: list[str | None] = [None] * n_rows
    for index in ids:
        split[index] = "validation" if held[rows["repository"][index]] else "train"
    for index in marked["id"]:
        split[index], rows["reason"][index] = None, "duplicate"
    kept = [index for index in ids if split[index]]
    named = {normalised_name(name) for name in corpus.hold_out}
    free = [i for i in kept if normalised_name(rows["repository"][i]) not in named]
    if len(kept) >= 2 and len(free) > 0 and len({split[index] for index in kept}) == 1:
        # One split is empty: too few packages to hold out a whole one.
        free.sort(key=lambda index: _unit_hash(corpus.seed, rows["sha256"][index]))
        n_held = max(1, min(round(corpus.validation_share * len(free)), len(free) - 1))
        for rank, index in enumerate(free):
            split[index] = "validation" if rank < n_held else "train"
    return split


def _is_held_out(corpus: Corpus, repository: str) -> bool:
    """Whether a package is held out whole; the standard library never is by its hash."""
    name = normalised_name(repository)
    if name in {normalised_name(held) for held in corpus.hold_out}:
        return True
    return name != "cpython" and _unit_hash(corpus.seed, name) < corpus.validation_share


def _unit_hash(seed: int, text: str) -> float:
    """A number in [0, 1) that depends on both arguments and nothing else."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def _write_shards(
    staged: Path,
    kept: list[int],
    split: list[str | None],
    rows: dict[str, list[Any]],
    seed: int,
    folder: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Write kept documents in an order mixed by their hash, so that a sequential reader sees all."""
    order = [f"{_unit_hash(seed, rows['sha256'][index]):.17f}" for index in kept]
    chosen = daft.from_pydict(
        {"id": kept, "split": [split[index] for index in kept], "order": order}
    )
    names = ("text", "source", "repository", "path", "licence", "n_bytes", "sha256")
    documents = (
        daft.read_parquet(str(staged))
        .select("id", *names)
        .join(chosen, on="id")
        .sort(["split", "order", "id"])
    )
    writers = {name: ShardWriter(folder, name) for name in SPLITS}
    with _progress(console) as progress:
        task = progress.add_task("writing shards", total=len(kept))
        for batch in documents.exclude("id", "order").to_arrow_iter():
            for row in batch.to_pylist():
                writers[row["split"]].add({**row, "language": "python"})
            progress.advance(task, batch.num_rows)
    for writer in writers.values():
        writer.close()
    return [shard for writer in writers.values() for shard in writer.shards]


def _drop_counts(rows: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """How many files each reason dropped, in the order of the filters, with a few examples."""
    examples: dict[str, list[str]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for index, reason in enumerate(rows["reason"]):
        if reason is not None:
            counts[reason] += 1
            # Every 37th and the first: neighbours in the list are alike.
            if len(examples[reason]) < EXAMPLES_PER_REASON and counts[reason] % 37 in (0, 1):
                examples[reason].append(f"{rows['repository'][index]}/{rows['path'][index]}")
    return {
        reason: {"n": counts[reason], "examples": examples[reason]}
        for reason in REASONS
        if counts[reason]
    }


def _manifest(
    identity: dict[str, Any],
    listing: Listing,
    rows: dict[str, list[Any]],
    split: list[str | None],
    drops: dict[str, dict[str, Any]],
    shards: list[dict[str, Any]],
) -> dict[str, Any]:
    """The manifest: identity, counts, shards, and a fingerprint over the shards."""
    n_listed = Counter(rows["source"])
    documents: dict[str, Counter[str]] = defaultdict(Counter)
    n_bytes: dict[str, Counter[str]] = defaultdict(Counter)
    for index, name in enumerate(split):
        if name is None:
            continue
        for group in ("split", "source", "licence"):
            value = name if group == "split" else rows[group][index]
            documents[group][value] += 1
            n_bytes[group][value] += rows["n_bytes"][index]

    def table(group: str) -> dict[str, dict[str, int]]:
        return {
            value: {"n_documents": documents[group][value], "n_bytes": n_bytes[group][value]}
            for value in sorted(documents[group])
        }

    held_out = {rows["repository"][i] for i, name in enumerate(split) if name == "validation"}
    packages = {rows["repository"][i] for i, name in enumerate(split) if name == "train"}
    fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
    return {
        **identity,
        "n_documents": {name: documents["split"][name] for name in SPLITS},
        "n_bytes": {name: n_bytes["split"][name] for name in SPLITS},
        "held_out_by": "document" if held_out & packages else "package",
        "held_out": sorted(held_out),
        "sources": {
            name: {"n_files": n_listed[name]}
            | table("source").get(name, {"n_documents": 0, "n_bytes": 0})
            for name in sorted(n_listed)
        },
        "licences": table("licence"),
        "dropped": drops,
        "shards": shards,
        "fingerprint": fingerprint.hexdigest(),
    }


def _write_whole(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it: the rename that follows must not overtake it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _progress(console: Console) -> Progress:
    """A progress bar on standard error, silent when that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _report(manifest: dict[str, Any], folder: Path, console: Console) -> None:
    """What was kept and what was dropped, in a few lines on standard error."""
    for name in SPLITS:
        documents, n_bytes = manifest["n_documents"][name], manifest["n_bytes"][name]
        console.print(f"{name}: {documents} documents, {n_bytes / 1e6:.1f} MB")
    for reason, drop in manifest["dropped"].items():
        console.print(f"dropped, {reason}: {drop['n']}")
    if missing := manifest["inputs"]["unavailable"]:
        console.print(f"not available: {', '.join(missing)}")
    console.print(f"wrote {folder}")
