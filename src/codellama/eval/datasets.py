"""Benchmark files: where they are looked for, how they are checked, and how they are read.

A file is known by its name in the data folder and by the SHA-256 of its content (uncompressed, so
that a recompressed copy is the same file). It is taken from `--data`, $CODELLAMA_DATA, a folder
shared/data beside or above the current one, or the cache; what is nowhere is downloaded once from
its official source, where there is one whose content is known.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama.artifact import write_file
from codellama.rows import parsed

MAX_BYTES = 1 << 30  # a gzip file of a megabyte can hold a gigabyte of zeros
KNOWN: dict[str, str] = {}
"""SHA-256 of the content of each file by name, from datasets.txt."""
SOURCES: dict[str, str] = {}
"""Official places of those whose content there is the same."""
for _line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
    if not _line.startswith("#"):
        _sha256, _name, *_place = _line.split()
        KNOWN[_name] = _sha256
        if _place:
            SOURCES[_name] = _place[0]


@dataclass(frozen=True)
class DataFile:
    """A benchmark file in memory, uncompressed, and the hash of its content."""

    path: str
    content: bytes
    sha256: str

    @property
    def text(self) -> str:
        """The content as text.

        Raises:
            ValueError: it is not UTF-8.
        """
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: cannot be read: {error}") from None

    def rows(self) -> list[dict[str, Any]]:
        """The rows of a JSON lines, JSON list or CSV file.

        Raises:
            ValueError: the content is none of these; names the line.
        """
        name = self.path.removesuffix(".gz")
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(self.text)))
        if name.endswith(".json"):
            rows = json.loads(self.text)
        else:
            rows = [row for _, row in parsed(self.path, self.text.split("\n"))]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{self.path}: expected a list of objects")
        return rows


def data_file(name: str, given: Path | None = None) -> DataFile:
    """Find a benchmark file by its name, check it, and read it.

    Args:
        name: a key of KNOWN.
        given: this file instead, whatever its content; a folder is searched first, with the check.

    Raises:
        ValueError: not found and not to be had, damaged, or other content than the known one.
    """
    if given is not None and not given.is_dir():
        return read_file(given)
    expected = KNOWN[name]
    for folder in _folders(given):
        # A file is also found directly in the folder, and uncompressed.
        for place in (name, name.removesuffix(".gz"), Path(name).name):
            if (folder / place).is_file():
                found = read_file(folder / place)
                if found.sha256 != expected:
                    raise ValueError(
                        f"{found.path}: content has SHA-256 {found.sha256}, expected {expected}; "
                        "name the file with --data to use it all the same"
                    )
                return found
    return _download(name, SOURCES.get(name, ""), expected)


def _folders(given: Path | None) -> list[Path]:
    named = os.environ.get("CODELLAMA_DATA")
    here = Path.cwd()
    shared = [above / "shared" / "data" for above in (here, *here.parents[:2])]
    return [*([given] if given else []), *([Path(named)] if named else []), *shared, _cache()]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codellama" / "data"


def read_file(path: Path) -> DataFile:
    """A file, uncompressed.

    Raises:
        ValueError: it cannot be read; names it.
    """
    try:
        return _unpacked(str(path), path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _unpacked(place: str, content: bytes) -> DataFile:
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{place}: cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{place}: more than {MAX_BYTES} bytes when uncompressed")
    return DataFile(place, content, hashlib.sha256(content).hexdigest())


def _download(name: str, url: str, expected: str) -> DataFile:
    """Fetch a file into the cache; only the known content is kept."""
    remedy = "give it with --data FILE, or its folder in $CODELLAMA_DATA"
    if not url:
        raise ValueError(f"{name}: not found, and there is no source to download it from; {remedy}")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            found = _unpacked(url, response.read(MAX_BYTES + 1))
    except OSError as error:
        raise ValueError(
            f"{name}: not found, and {url} cannot be reached ({error}); {remedy}"
        ) from None
    if found.sha256 != expected:
        raise ValueError(f"{url}: content has SHA-256 {found.sha256}, expected {expected}")
    place = _cache() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    is_packed = name.endswith(".gz")
    write_file(place, gzip.compress(found.content, mtime=0) if is_packed else found.content)
    return DataFile(str(place), found.content, found.sha256)
