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
    """A benchmark file in memory."""

    path: str
    content: bytes
    """Uncompressed."""
    sha256: str
    """Of the content."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows of a JSON lines, JSON list or CSV file.

        Raises:
            ValueError: the content is none of these; names the line.
        """
        text = self.content.decode("utf-8-sig")
        name = self.path.removesuffix(".gz")
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        if name.endswith(".json"):
            return _dictionaries(self.path, json.loads(text))
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"{self.path}:{number}: not JSON: {error}") from None
        return _dictionaries(self.path, rows)


def data_file(name: str, given: Path | None = None) -> DataFile:
    """Find a benchmark file by its name, check it, and read it.

    Args:
        name: a key of KNOWN.
        given: this file instead, whatever its content; a folder is searched first, with the check.

    Raises:
        ValueError: not found and not to be had, damaged, or other content than the known one.
    """
    if given is not None and not given.is_dir():
        return _read(given)
    expected = KNOWN[name]
    for folder in _folders(given):
        # A file is also found directly in the folder, and uncompressed.
        for place in (name, name.removesuffix(".gz"), Path(name).name):
            if (folder / place).is_file():
                found = _read(folder / place)
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


def _read(path: Path) -> DataFile:
    """A file, uncompressed; names it where it cannot be read."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes when uncompressed")
    return DataFile(str(path), content, hashlib.sha256(content).hexdigest())


def _download(name: str, url: str, expected: str) -> DataFile:
    """Fetch a file into the cache; only the known content is kept."""
    remedy = "give it with --data FILE, or its folder in $CODELLAMA_DATA"
    if not url:
        raise ValueError(f"{name}: not found, and there is no source to download it from; {remedy}")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            raw = response.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(
            f"{name}: not found, and {url} cannot be reached ({error}); {remedy}"
        ) from None
    content = raw
    if url.endswith(".gz"):
        try:
            content = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{url}: not a whole gzip file: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{url}: content has SHA-256 {found}, expected {expected}")
    place = _cache() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return DataFile(str(place), content, found)


def _dictionaries(path: str, rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects")
    return rows
