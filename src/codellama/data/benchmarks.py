"""Benchmark files: the texts in them, which must not be trained on.

In: .jsonl, .json or .csv files, also with .gz; any other file is one text. Out: texts.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".json", ".csv")


def benchmark_files(paths: tuple[str, ...]) -> list[Path]:
    """The files that paths name, of folders those of a known ending.

    Raises:
        ValueError: a path does not exist.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"benchmarks.paths: {path}: no such file or folder")
        if path.is_dir():
            found += [file for file in sorted(path.rglob("*")) if _ending(file) in ENDINGS]
        else:
            found.append(path)
    return found


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def benchmark_texts(path: Path) -> Iterator[str]:
    """Every text of a benchmark file; a prompt and its solution also as one.

    Raises:
        ValueError: the file cannot be read as what its ending says.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
        if _ending(path) == ".jsonl":
            for line in text.splitlines():
                yield from _texts(json.loads(line)) if line.strip() else ()
        elif _ending(path) == ".json":
            yield from _texts(json.loads(text))
        elif _ending(path) == ".csv":
            csv.field_size_limit(1 << 30)
            for row in csv.reader(io.StringIO(text)):
                yield from row
        else:
            yield text
    except (OSError, ValueError, EOFError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as {_ending(path) or 'text'}: {error}") from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        solution = value.get("canonical_solution") or value.get("reference_code")
        if isinstance(value.get("prompt"), str) and isinstance(solution, str):
            suffix = value.get("suffix")
            yield value["prompt"] + solution + (suffix if isinstance(suffix, str) else "")
        for key, part in value.items():
            if isinstance(key, str) and len(key) > 40:  # a sentence: answers by truth
                yield key
            yield from _texts(part)
