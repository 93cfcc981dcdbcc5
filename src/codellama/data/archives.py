"""Containers: the documents inside archives, git repositories and tables, one after another.

Everything is read as a stream and nothing is extracted to disk. No container is trusted: members
are read up to a limit whatever their headers say, what unpacks to far more than it was is left off,
and damage ends one container and nothing else. What cannot be read is handed on with its reason.

In: an open binary file, local or remote. Out: `RawDocument` records.
"""

from __future__ import annotations

import bz2
import contextlib
import email
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from codellama.data.licences import LICENCE_FILE, licence_of_metadata
from codellama.recipe import Source

MAX_RATIO = 200  # unpacked to packed; source code reaches 20, and gzip cannot exceed 1032
FREE_BYTES = 256_000_000  # may be unpacked whatever the ratio
LICENCE_BYTES = 1_000_000
UNWANTED = "not wanted"  # a member that is counted, and no row
PROJECT_FILES = ("METADATA", "PKG-INFO")

Damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError)
Damage += (NotImplementedError, RuntimeError, ValueError, OverflowError, pa.ArrowException)
# RuntimeError: an encrypted member. ValueError: Daft's for remote files, and broken headers.


@dataclass(slots=True)
class RawDocument:
    """One file or row of a container: its bytes, or the reason why there are none."""

    path: str
    content: bytes = b""
    reason: str | None = None
    detail: str = ""
    repository: str | None = None
    licence: str | None = None
    language: str | None = None


class BombError(OSError):
    """A container unpacks to far more than its size."""


Wanted = Callable[[str], bool]
Rows = Iterator[tuple[int, dict[str, Any] | RawDocument]]  # each with its number or place

END = 1 << 65  # beyond every offset in a container, also in a damaged one
ZIP_ENDINGS = (".zip", ".whl", ".egg", ".jar")
IN_PARTS = (*ZIP_ENDINGS, ".parquet", ".jsonl", ".ndjson", ".json")
"""Of containers of which a part can be read without what stands before it."""


def read_archive(
    file: BinaryIO, name: str, wanted: Wanted, max_bytes: int, part: range
) -> Iterator[RawDocument]:
    """The wanted members of a zip or (compressed) tar file, with the licence that it declares.

    max_bytes: of a member are read, one more to show that it is larger. part: the bytes at one of
    which a member of a zip file begins that is read.
    """
    if name.lower().endswith(ZIP_ENDINGS):
        return _zip(file, wanted, max_bytes, part)
    return _tar(file, name, wanted, max_bytes)


def up_to_damage(documents: Iterator[RawDocument], name: str, file: Any) -> Iterator[RawDocument]:
    """The documents of a container, and behind them why it could not be read to its end."""
    end = RawDocument(name)
    try:
        yield from documents
    except KeyError as error:
        end.reason, end.detail = "missing column", str(error.args[0])
    except BombError:
        end.reason = "archive bomb"
    except Damage as error:
        end.reason, end.detail = "damaged archive", _plain(error)
    if error := getattr(getattr(file, "raw", None), "error", None):
        end.reason, end.detail = "unavailable", _plain(error)
    if end.reason:
        yield end


def _zip(file: BinaryIO, wanted: Wanted, max_bytes: int, part: range) -> Iterator[RawDocument]:
    archive = zipfile.ZipFile(file)
    size = min(file.seek(0, os.SEEK_END), part.stop) - part.start
    members = sorted(archive.infolist(), key=lambda info: info.filename)
    evidence: list[tuple[str, bytes]] = []
    for info in members:
        if _is_evidence(info.filename) and info.file_size <= LICENCE_BYTES:
            with archive.open(info) as member:
                evidence.append((info.filename, member.read(LICENCE_BYTES)))
    licence, n_bytes = _licence(evidence), 0
    for info in members:
        if info.is_dir() or max(info.header_offset, 0) not in part:
            continue
        document = RawDocument(info.filename, licence=licence)
        if not wanted(info.filename):
            document.reason = UNWANTED
        elif info.file_size > max_bytes:
            document.reason = "too large"
        else:
            try:
                with archive.open(info) as member:
                    document.content = member.read(max_bytes + 1)
            except Damage as error:
                document.reason, document.detail = "unreadable", _plain(error)
        yield document
        n_bytes += len(document.content)
        if n_bytes > max(FREE_BYTES, MAX_RATIO * size):
            raise BombError("members may overlap")


def _tar(file: BinaryIO, name: str, wanted: Wanted, max_bytes: int) -> Iterator[RawDocument]:
    # Read twice: the licence may stand behind the files that it is for.
    evidence: list[tuple[str, bytes]] = []
    with contextlib.suppress(*Damage):  # said when it is met again
        found = _members(file, name, _is_evidence, LICENCE_BYTES)
        evidence.extend((each.path, each.content) for each in found if not each.reason)
    file.seek(0)
    licence = _licence(evidence)
    for document in _members(file, name, wanted, max_bytes):
        document.licence = licence
        yield document


def _members(file: BinaryIO, name: str, wanted: Wanted, max_bytes: int) -> Iterator[RawDocument]:
    """The members in their order, of which links and devices are never wanted."""
    stream = Limited(unpacked(file, name), file)
    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|") as archive:
        for member in archive:
            if member.isreg() and wanted(member.name):
                content = archive.extractfile(member)
                yield RawDocument(member.name, content.read(max_bytes + 1) if content else b"")
            elif not member.isdir():
                yield RawDocument(member.name, reason=UNWANTED)
            cast(Any, archive).members = []  # it would keep all of them
    while stream.read(1 << 20):  # a checksum stands at the end
        pass
    if len(stream.tail) < 512 or stream.tail.strip(b"\0"):
        raise tarfile.ReadError("ends without the mark of its end")


def _is_evidence(path: str) -> bool:
    """Whether a member may say what licence an archive is under: at its top, or of a wheel."""
    folder, _, name = path.removeprefix("./").rpartition("/")
    if ".dist-info" in folder:  # also METADATA and licenses/ of a wheel
        return name in PROJECT_FILES or bool(LICENCE_FILE.fullmatch(name))
    return "/" not in folder and (name == "PKG-INFO" or bool(LICENCE_FILE.fullmatch(name)))


def _licence(evidence: Iterable[tuple[str, bytes]]) -> str:
    """The licence that metadata and licence files of an archive declare."""
    headers, texts = email.message_from_string(""), []
    for path, content in evidence:
        if path.endswith(PROJECT_FILES):
            headers = email.message_from_bytes(content)
        else:
            texts.append(content.decode("utf-8", "replace"))
    return licence_of_metadata(headers, texts)


class Limited(io.RawIOBase):
    """A stream of unpacked bytes that ends with an error where the packed ones were too few."""

    def __init__(self, stream: Any, packed: BinaryIO) -> None:
        self._stream, self._packed, self._n_bytes = stream, packed, 0
        self.tail = b""
        """The last bytes that were read."""

    def readable(self) -> bool:
        """True; what `io` asks of a stream."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one read does; a `BombError` where too much comes out."""
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._n_bytes += len(data)
        self.tail = (self.tail + data[-512:])[-512:]
        if self._n_bytes > FREE_BYTES and self._n_bytes > MAX_RATIO * self._packed.tell():
            raise BombError("unpacks to far more than its size")
        return len(data)


def unpacked(file: BinaryIO, name: str) -> Any:
    """A stream of the bytes that a file's ending says are compressed in it."""
    ending = name.lower().rpartition(".")[2]
    if ending in ("gz", "tgz"):
        return gzip.GzipFile(fileobj=file)
    if ending in ("zst", "tzst", "zstd"):
        # Arrow closes what it is given; of this the file itself stays open.
        return pa.CompressedInputStream(pa.PythonFile(Limited(file, file), "r"), "zstd")
    if ending in ("bz2", "tbz2"):
        return bz2.BZ2File(file)
    if ending in ("xz", "txz"):
        return lzma.LZMAFile(file)
    return file


def read_git(folder: str, files: list[tuple[str, str]], max_bytes: int) -> Iterator[RawDocument]:
    """Files of a git repository as (path, blob id), out of its object store.

    No hook runs and nothing is fetched: only `git cat-file` is called.
    """
    command = ["git", "-C", folder, "cat-file", "--batch"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | GIT_ENVIRONMENT,
    )
    assert process.stdin
    assert process.stdout
    with process:
        for path, blob in files:
            with contextlib.suppress(BrokenPipeError):  # read as an empty answer
                process.stdin.write(blob.encode() + b"\n")
                process.stdin.flush()
            fields = process.stdout.readline().split()
            if len(fields) != 3:
                yield RawDocument(path, reason="unreadable", detail="no such object")
                continue
            size = int(fields[2])
            content = process.stdout.read(min(size, max_bytes + 1))
            rest = size + 1 - len(content)  # a line end follows
            while rest > 0 and (passed := process.stdout.read(min(rest, 1 << 20))):
                rest -= len(passed)
            yield RawDocument(path, content)


GIT_ENVIRONMENT = {"GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def read_table(
    file: BinaryIO, name: str, source: Source, max_bytes: int, part: range
) -> Iterator[RawDocument]:
    """The rows of a Parquet or JSON lines file as documents.

    part: the bytes at one of which a line or row group begins that is read. A row without a path is
    named by its number in Parquet, and by the (unpacked) byte at which its line begins in JSON.
    """
    wanted = {
        field: [columns] if isinstance(columns, str) else list(columns)
        for field, columns in source.columns.items()
    }
    rows = _parquet_rows if source.kind == "parquet" else _json_rows
    needed = list(dict.fromkeys(name for names in wanted.values() for name in names))
    for number, row in rows(file, name, needed, max_bytes, part):
        path = f"{name}#{number}"
        if isinstance(row, RawDocument):
            row.path = path
            yield row
            continue
        absent = [column for column in wanted["text"] if column not in row]
        if absent or not all(isinstance(row[c], str | None) for c in wanted["text"]):
            detail = f"{absent[0]} is missing" if absent else "text is no string"
            yield RawDocument(path, reason="missing column", detail=detail)
            continue
        values = {
            field: "\n\n".join(str(row[column]) for column in columns if row.get(column))
            for field, columns in wanted.items()
        }
        yield RawDocument(
            values.get("path") or path,
            values["text"].encode("utf-8", "surrogatepass")[: max_bytes + 1],
            repository=values.get("repository") or None,
            licence=values.get("licence") or None,
            language=(values.get("language") or "").lower() or None,
        )


def _parquet_rows(file: BinaryIO, name: str, columns: list[str], _limit: int, part: range) -> Rows:
    size = file.seek(0, os.SEEK_END)
    table = pq.ParquetFile(file, buffer_size=1 << 20)  # or it would read columns of a group whole
    if absent := [name for name in columns if name not in table.schema_arrow.names]:
        raise KeyError(f"{absent[0]}; the file has {', '.join(table.schema_arrow.names[:20])}")
    number = 0
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        begin = about.column(0).dictionary_page_offset or about.column(0).data_page_offset
        if max(begin, 0) in part:
            yield from enumerate(_group_rows(table, group, columns, name, size), number)
        number += about.num_rows


def _group_rows(
    table: pq.ParquetFile, group: int, columns: list[str], name: str, size: int
) -> Iterator[dict[str, Any] | RawDocument]:
    """The rows of a row group, unless it holds far more than its size; pages are read singly."""
    about = table.metadata.row_group(group)
    chunks = [about.column(number) for number in range(about.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    packed = min(size, sum(chunk.total_compressed_size for chunk in chunks))
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    left = max(FREE_BYTES, MAX_RATIO * packed)
    if unpacked <= left:
        n_rows = min(64, max(1, 4 * FREE_BYTES // max(unpacked, 1)))  # one may be all of it
        for batch in table.iter_batches(n_rows, row_groups=[group], columns=columns):
            left -= batch.nbytes  # a dictionary's values are repeated here
            if left < 0:
                break
            yield from batch.to_pylist()
        else:
            return
    yield RawDocument(name, reason="archive bomb", detail=f"row group {group}")


def _json_rows(file: BinaryIO, name: str, _columns: list[str], max_bytes: int, part: range) -> Rows:
    at = file.seek(max(part.start - 1, 0))
    stream = io.BufferedReader(Limited(unpacked(file, name), file), 1 << 20)
    if part.start:  # to the first line that begins in this part; the one before is another's
        at = _pass_line(stream, at, part.stop)
    limit = 6 * max_bytes + 65_536  # a character can be written as \u0000; other columns
    while at < part.stop and (line := stream.readline(limit)):
        begin, at = at, at + len(line)
        if len(line) == limit and not line.endswith(b"\n"):
            at = _pass_line(stream, at)
            yield begin, RawDocument(name, reason="too large")
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield begin, RawDocument(name, reason="damaged row", detail=_plain(error))
            continue
        yield begin, row if isinstance(row, dict) else RawDocument(name, reason="damaged row")


def _pass_line(stream: BinaryIO, at: int, end: int = END) -> int:
    """Where the line ends that `at` is in; not further than to a place beyond `end`."""
    while at < end and (passed := stream.readline(1 << 20)):
        at += len(passed)
        if passed.endswith(b"\n"):
            break
    return at


def _plain(error: BaseException) -> str:
    """What went wrong in one short line, without names of this machine."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [""])[0][:120] or type(error).__name__
