"""Sources: which files a source wants, and the documents of one unit of work.

A unit is what one worker reads in one go: a few hundred files of a tree, some blobs of a git
repository, an archive or a table, or a part of one. Which there are is `listing`'s.

In: a `Unit`. Out: its documents, bytes or a reason, from `read_unit`.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from codellama.data import archives
from codellama.data.archives import END, RawDocument
from codellama.data.languages import DATA, PROSE, language_of
from codellama.data.licences import LICENCE_FILE, UNKNOWN
from codellama.recipe import Source

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", ".git", ".hg", ".tox", ".nox", ".venv", "venv", "node_modules"}
    | {"site-packages", "dist-packages", "lib-dynload"}
)
REMOTE = re.compile(r"(?:s3|gs|gcs|hf|https?|az|abfss)://")


class Entry(NamedTuple):
    """One file of a unit."""

    repository: str
    """Package or top-level folder: what is held out whole."""
    path: str
    """Inside the repository's tree, with forward slashes; never a path of this machine."""
    licence: str
    location: str
    """The file as `os.fsdecode` writes it, or a git blob."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker reads in one go."""

    source: str
    reader: Literal["files", "git", "archive", "table"]
    location: str
    """Archive, table or repository, local or a URL; empty for files."""
    name: str
    """What it is called in reports, the same on every machine."""
    state: str
    """Changes whenever the content may have changed."""
    n_bytes: int
    repository: str = ""
    licence: str = UNKNOWN
    entries: tuple[Entry, ...] = ()
    begin: int = 0
    end: int = END
    """Of an archive or table, what begins at one of these bytes is read."""


def takes(source: Source, path: str) -> bool:
    """Whether a file may be wanted, by its name; its first line may still say otherwise."""
    *folders, name = path.split("/")
    if not SKIPPED_FOLDERS.isdisjoint(folders):
        return False
    language = language_of(path)
    if language is None:
        # Modules of packages have endings; elsewhere a script may lack one.
        may_be_script = source.kind in ("tree", "git", "archive") and "." not in name
        return may_be_script and not LICENCE_FILE.fullmatch(name)
    return takes_language(source, language)


def takes_language(source: Source, language: str) -> bool:
    """Whether a source wants documents of a language."""
    if source.content != "code":
        return language in PROSE
    return language in source.languages or ("all" in source.languages and language not in DATA)


def read_unit(unit: Unit, source: Source, max_bytes: int) -> Iterator[RawDocument]:
    """The documents of a unit one after another, each of at most `max_bytes + 1` bytes.

    Nothing is raised for bad input: it comes as a document with a reason.
    """
    if unit.reader == "files":
        for entry in unit.entries:
            document = RawDocument(entry.path, repository=entry.repository, licence=entry.licence)
            try:
                with open(open_regular(os.fsencode(entry.location)), "rb") as file:
                    document.content = file.read(max_bytes + 1)
            except OSError as error:
                document.reason = "unsafe path" if error.errno == errno.EXDEV else "unreadable"
            yield document
        return
    for document in _contained(unit, source, max_bytes):
        document.repository = as_text(document.repository or unit.repository)
        if document.licence in (None, UNKNOWN):
            document.licence = unit.licence
        parts = document.path.split("/")
        if document.path.startswith(("/", "\\")) or ".." in parts or "\\" in document.path:
            document.reason, document.content = "unsafe path", b""
        document.path = as_text(document.path.removeprefix("./"))
        yield document


def _contained(unit: Unit, source: Source, max_bytes: int) -> Iterator[RawDocument]:
    """The documents of a repository, archive or table, as it names them."""
    if unit.reader == "git":
        blobs = [(entry.path, entry.location) for entry in unit.entries]
        yield from archives.read_git(unit.location, blobs, max_bytes)
        return
    try:
        file = open_location(unit.location)
    except (OSError, ValueError) as error:  # ValueError: Daft's, for what is not local
        detail = str(error).splitlines()[0][:120] if REMOTE.match(unit.location) else ""
        yield RawDocument(unit.name, reason="unavailable", detail=detail)
        return
    with file:
        part = range(unit.begin, unit.end)
        if unit.reader == "table":
            found = archives.read_table(file, unit.name, source, max_bytes, part)
        else:
            found = archives.read_archive(file, unit.name, partial(takes, source), max_bytes, part)
        yield from archives.up_to_damage(found, unit.name, file)


def open_location(location: str) -> BinaryIO:
    """Open a local file or a URL for reading and seeking.

    Raises:
        OSError, ValueError: it cannot be opened.
    """
    if not REMOTE.match(location):
        return open(open_regular(os.fsencode(location)), "rb")
    import daft

    return cast(BinaryIO, io.BufferedReader(cast(Any, _Remote(daft.open_file(location, "rb", 0)))))


class _Remote:
    """A remote file that keeps the error of its network, which readers take for damage."""

    def __init__(self, file: Any) -> None:
        self._file, self.error = file, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except Exception as error:
            self.error = error
            raise


def open_regular(location: bytes) -> int:
    """Open without blocking on a FIFO, and refuse what is not a regular file."""
    if not location:
        raise OSError(errno.EXDEV, "a link that leads out of its folder")
    descriptor = os.open(location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(location))
    return descriptor


def as_text(path: str) -> str:
    """A path that can be stored as UTF-8, whatever bytes the file system holds."""
    return path.replace(os.sep, "/").encode("utf-8", "backslashreplace").decode("utf-8")
