"""JSON lines that a killed process may leave at any moment: read them, go on writing them.

A row is written with one flush; what a kill cuts in the middle is the last line, and is dropped.
Samples, metrics and all files of self-instruct are such files.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codellama.artifact import write_file

Row = dict[str, Any]


def parsed(path: str | Path, lines: Iterable[str | bytes]) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line that is not empty.

    Raises:
        ValueError: a line is not JSON; names it.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a file; none where there is no file.

    Raises:
        ValueError: a line is no JSON object; names it.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for where, row in parsed(path, lines):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object")
        rows.append(row)
    return rows


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Row], None]]:
    """Yield a function that appends a row, behind the last whole line of the file.

    Raises:
        ValueError: another process appends to the file.
    """
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process writes this file") from None
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def append(row: Row) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        yield append


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a whole file at once."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))
