"""Staging: one unit of a source becomes one Parquet file of examined documents.

    unit -> documents -> filters -> secrets -> benchmarks -> keys and signatures -> file

A file is named after everything that decides its content, so that one that exists is never made
again: that is how an interrupted run resumes and how a new source leaves the others alone.

In: a `Unit` and the settings. Out: FOLDER/KEY.parquet with the columns of `columns()`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from codellama.data.archives import UNWANTED, RawDocument
from codellama.data.corpus import REPEATED
from codellama.data.decontaminate import BlockList, cut
from codellama.data.dedup import KEY_BYTES, normalised_key
from codellama.data.extract import docstrings, notebook_text
from codellama.data.filters import judge_bytes, judge_path
from codellama.data.languages import kind_of, language_of
from codellama.data.near_dedup import signatures
from codellama.data.secrets import redact
from codellama.data.sources import REMOTE, Entry, Unit, read_unit, takes_language
from codellama.recipe import Filters, NearDuplicates, Source

VERSION = 4  # of the rules below and in the modules they call: a change of meaning raises it
BATCH_BYTES = 4_000_000  # of text, which a worker holds at a time
REJECT_BYTES = 20_000  # of a rejected document, where those are kept


class Settings(BaseModel, frozen=True):
    """What of a recipe decides how a document is examined."""

    filters: Filters
    near_duplicates: NearDuplicates | None = None
    block_list: str = ""
    """File that `BlockList.load` reads; empty looks for no benchmarks."""
    cut_hits: bool = False
    keep_rejects: bool = False


def columns(n_hashes: int = 0) -> pa.Schema:
    """The columns of a staged file; a dropped document has a reason and no text."""
    names = ("repository", "path", "language", "kind", "licence", "reason", "detail")
    fields = [(name, pa.string()) for name in names]
    fields += [("n_bytes", pa.int64()), ("key", pa.binary(KEY_BYTES)), ("sha256", pa.string())]
    fields += [("hits", pa.list_(pa.string())), ("redacted", pa.list_(pa.string()))]
    if n_hashes:
        fields.append(("signature", pa.binary(4 * n_hashes)))
    return pa.schema([*fields, ("text", pa.large_string()), ("rejected", pa.large_string())])


def staged_key(unit: Unit, source: Source, settings: Settings) -> str:
    """The name of a unit's file: equal keys have equal contents."""
    python = ".".join(platform.python_version_tuple()[:2])  # decides what parses
    how = source.model_dump(mode="json", exclude={"path", "packages"})
    block_list = Path(settings.block_list).stem  # named after its content
    fields = (VERSION, asdict(unit), how, settings.model_dump_json(), block_list, python)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def stage_unit(unit: Unit, source: Source, settings: Settings, folder: Path, key: str) -> None:
    """Read and examine a unit and write its file.

    Raises:
        OSError: the file cannot be written. Bad input raises nothing: it is a row with a reason.
    """
    near = settings.near_duplicates
    schema = columns(near.n_hashes if near else 0)
    temporary = folder / f".{key}.{os.getpid()}.tmp"
    n_other = n_unreached = 0
    try:
        with pq.ParquetWriter(
            temporary, schema, compression="zstd", compression_level=1, use_dictionary=REPEATED
        ) as writer:
            rows: list[dict[str, Any]] = []
            n_bytes = 0
            for raw in read_unit(unit, source, settings.filters.max_bytes):
                found = list(_examined(raw, source, settings))
                n_other += not found
                n_unreached += raw.reason == "unavailable" and bool(REMOTE.match(unit.location))
                rows += found
                n_bytes += sum(len(row["text"] or "") + len(row["rejected"] or "") for row in found)
                if n_bytes >= BATCH_BYTES or len(rows) >= 8192:
                    writer.write_table(_table(rows, schema, near))
                    rows, n_bytes = [], 0
            writer.write_table(_table(rows, schema, near))
            counts = {"n_other": str(n_other), "n_unreached": str(n_unreached)}
            writer.add_key_value_metadata(counts)
        temporary.replace(folder / f"{key}.parquet")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def stage_json(task: str) -> str:
    """The same with its arguments as JSON, for workers; returns the key."""
    fields, source, settings, folder, key = json.loads(task)
    fields["entries"] = tuple(Entry(*entry) for entry in fields["entries"])
    examined = Source.model_validate(source), Settings.model_validate(settings)
    if not Path(folder, f"{key}.parquet").exists():  # a cluster asks again when a node was lost
        stage_unit(Unit(**fields), *examined, Path(folder), key)
    return key


def _table(rows: list[dict[str, Any]], schema: pa.Schema, near: NearDuplicates | None) -> pa.Table:
    if near:
        kept = [row for row in rows if row["text"] is not None]
        found = signatures([row["text"] for row in kept], near)
        for row, signature in zip(kept, found, strict=True):
            row["signature"] = signature.tobytes()
    return pa.Table.from_pylist(rows, schema=schema)


def _examined(raw: RawDocument, source: Source, settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of one file: none if the source does not want it, else it and its docstrings."""
    if raw.reason == UNWANTED:
        return
    language = raw.language or language_of(raw.path, raw.content[:200])
    if source.kind in ("parquet", "jsonl"):
        # A row is wanted unless it is known to be in another language.
        language = language or ("text" if source.content != "code" else "unknown")
        other = language != "unknown" and not takes_language(source, language)
        if source.content == "code" and other and not raw.reason:
            return
    elif raw.reason is None and (language is None or not takes_language(source, language)):
        return
    language = language or "unknown"
    kind = source.content if source.content != "code" else kind_of(language)
    row = {
        "repository": raw.repository,
        "path": raw.path,
        "language": language,
        "kind": kind,
        "licence": source.licence if raw.licence in (None, "", "unknown") else raw.licence,
        "detail": raw.detail or None,
    }
    is_whole = len(raw.content) <= settings.filters.max_bytes
    if language == "notebook" and raw.reason is None and is_whole:
        content = notebook_text(raw.content)
        if content is None:
            raw.reason = "does not parse"
        else:
            raw.content = content.encode("utf-8", "replace")
    result = _judged(row, raw, settings)
    yield result
    if source.docstrings and language == "python" and result["text"] is not None:
        prose = docstrings(result["text"])
        if prose:
            about = {"path": f"{raw.path}#docstrings", "kind": "code-text", "language": "text"}
            text = RawDocument(about["path"], prose.encode())
            yield _judged(row | about | {"licence": result["licence"]}, text, settings)


def _judged(row: dict[str, Any], raw: RawDocument, settings: Settings) -> dict[str, Any]:
    """One row of the staged file: the text with its keys, or the reason why there is none."""
    filters, is_code = settings.filters, row["kind"] == "code"
    licence: str | None = row["licence"]
    text, reason = None, raw.reason or judge_path(row["path"], row["licence"], filters)
    redacted: list[str] = []
    hits: tuple[str, ...] = ()
    if not reason:
        verdict = judge_bytes(raw.content, filters, row["language"], is_code, licence)
        text, reason, licence = verdict.text, verdict.reason, verdict.licence or licence
    if text is not None and settings.block_list:
        found = BlockList.load(Path(settings.block_list)).find(text, is_code)
        hits = found.benchmarks
        if hits and settings.cut_hits:
            rest = cut(text, found.spans, is_code).encode()
            verdict = judge_bytes(rest, filters, row["language"], is_code)
            text, reason = verdict.text, "benchmark" if verdict.reason else None
        elif hits:
            text, reason = None, "benchmark"
    if text is not None and filters.redact:
        text, counts = redact(text)
        redacted = sorted(counts.elements())
    rejected = None
    if text is None and settings.keep_rejects:
        rejected = raw.content[:REJECT_BYTES].decode("utf-8", "replace")
    content = text.encode() if text is not None else b""
    return row | {
        "licence": licence,
        "text": text,
        "reason": reason,
        "n_bytes": len(content),
        "key": normalised_key(text) if text is not None else None,
        "sha256": hashlib.sha256(content).hexdigest() if text is not None else None,
        "hits": list(hits),
        "redacted": redacted,
        "rejected": rejected,
    }
