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
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq
from daft import DataType, col
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from codellama.artifact import code_version, new_folder, read_manifest, write_manifest
from codellama.data.corpus import KIND, SPLITS, ShardWriter
from codellama.data.dedup import normalised_key
from codellama.data.filters import REASONS, judge_bytes, judge_path
from codellama.data.sources import Listing, list_sources, read_file
from codellama.data.split import assign_splits, unit_hash
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
            _say(f"{folder}: up to date, nothing to do")
            return folder
        try:
            with new_folder(folder) as partial:
                manifest = _build(recipe.corpus, listing, partial, console)
                write_manifest(partial, KIND, **identity, **manifest)
        except OSError as error:
            raise OSError(f"{folder}: could not write the corpus: {error}") from error
    _report(identity | manifest, folder)
    return folder


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder above the corpus locked; the lock ends with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is preparing this corpus") from None
        yield
    finally:
        os.close(descriptor)


def _identity(corpus: Corpus, listing: Listing) -> dict[str, Any]:
    """Everything that decides what the corpus is: equal identities give equal corpora."""
    digest = hashlib.sha256()
    for file in listing.files:
        fields = (file.source, file.repository, file.path, file.licence, file.size, file.crc)
        digest.update(json.dumps(fields).encode() + b"\n")
    return {
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
        manifest = read_manifest(folder, KIND)
    except ValueError:
        return False
    expected = identity | {"code_version": code_version()}
    sizes = {shard["file"]: shard["file_bytes"] for shard in manifest.get("shards", [])}
    there = {file.name: file.stat().st_size for file in folder.glob("*.parquet")}
    return sizes == there and all(manifest.get(key) == expected[key] for key in expected)


_EXAMINED = DataType.struct(
    {
        "text": DataType.string(),
        "reason": DataType.string(),
        "key": DataType.string(),
        "n_bytes": DataType.int64(),
        "sha256": DataType.string(),
    }
)


_STAGED = pa.schema(
    [("id", pa.int64())]
    + [(name, pa.large_string()) for name in ("source", "repository", "path", "licence")]
    + [(name, pa.large_string()) for name in ("text", "reason", "key")]
    + [("n_bytes", pa.int64()), ("sha256", pa.large_string())]
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


def _build(corpus: Corpus, listing: Listing, folder: Path, console: Console) -> dict[str, Any]:
    """Write shards into the folder and return what the manifest says about them."""
    if not listing.files:
        missing = ", ".join(listing.unavailable) or "nothing"
        raise ValueError(
            f"the corpus is empty: no Python files in its sources (not available: {missing})"
        )
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
        n_files = len(listing.files)
        raise ValueError(f"the corpus is empty: of {n_files} files none was kept ({counts or '-'})")
    if "train" not in split:
        raise ValueError("corpus.hold_out names every package: nothing is left to train on")
    shards = _write_shards(staged, kept, split, small, corpus.seed, folder, console)
    staged.unlink()
    return _contents(small, split, drops, shards)


def _stage(listing: Listing, filters: Filters, staged: Path) -> Iterator[pa.Table]:
    """Examine all files, write the rows to a Parquet file, and yield them batch by batch."""
    fields = ("source", "repository", "path", "licence", "location", "member", "size")
    frame = daft.from_pydict(
        {"id": list(range(len(listing.files)))}
        | {name: [getattr(file, name) for file in listing.files] for name in fields}
    )
    in_workers = len(listing.files) >= IN_PROCESS_FILES
    examine = daft.func(_examine, return_dtype=_EXAMINED, unnest=True, use_process=in_workers)
    inputs = [col(name) for name in ("path", "licence", "location", "member", "size")]
    examined: Any = examine(*inputs, filters)
    kept_columns = [col(name) for name in ("id", "source", "repository", "path", "licence")]
    rows = frame.into_batches(BATCH_FILES).select(*kept_columns, examined)
    expected = 0
    with pq.ParquetWriter(staged, _STAGED, compression="zstd", compression_level=1) as writer:
        for batch in rows.to_arrow_iter():
            table = pa.Table.from_batches([batch]).cast(_STAGED)
            assert table.column("id")[0].as_py() == expected, "Daft keeps the order of rows"
            expected += table.num_rows
            writer.write_table(table)
            yield table


def _write_shards(
    staged: Path,
    kept: list[int],
    split: list[str | None],
    rows: dict[str, list[Any]],
    seed: int,
    folder: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Write kept documents in an order mixed by their hash, for readers that go in order."""
    order = [f"{unit_hash(seed, rows['sha256'][index]):.17f}" for index in kept]
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
    paths: dict[str, list[str]] = defaultdict(list)
    for index, reason in enumerate(rows["reason"]):
        if reason is not None:
            paths[reason].append(f"{rows['repository'][index]}/{rows['path'][index]}")
    return {
        # Spread over the list, for neighbours in it are alike.
        reason: {"n": len(found), "examples": found[:: -(-len(found) // EXAMPLES_PER_REASON)]}
        for reason in REASONS
        if (found := paths[reason])
    }


def _contents(
    rows: dict[str, list[Any]],
    split: list[str | None],
    drops: dict[str, dict[str, Any]],
    shards: list[dict[str, Any]],
) -> dict[str, Any]:
    """The manifest's part on the result: counts, shards, and a fingerprint over the shards."""
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


def _report(manifest: dict[str, Any], folder: Path) -> None:
    """What was kept and what was dropped, in a few lines on standard error."""
    for name in SPLITS:
        documents, n_bytes = manifest["n_documents"][name], manifest["n_bytes"][name]
        _say(f"{name}: {documents} documents, {n_bytes / 1e6:.1f} MB")
    for reason, drop in manifest["dropped"].items():
        _say(f"dropped, {reason}: {drop['n']}")
    if missing := manifest["inputs"]["unavailable"]:
        _say(f"not available: {', '.join(missing)}")
    _say(f"wrote {folder}")


def _say(line: str) -> None:
    """Print one line as it is: rich would wrap it and read brackets in a path as markup."""
    print(line, file=sys.stderr)
