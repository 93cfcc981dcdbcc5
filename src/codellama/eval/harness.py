"""The harness: sample a task, score it, and leave a folder that says how.

A run's folder holds one folder for each task and temperature: samples.jsonl, its settings, and
results.json. What is there is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from codellama.artifact import only_process, write_file
from codellama.eval.report import shown, write_report
from codellama.eval.samples import read_samples, write_samples
from codellama.eval.sampling import Decoding, sample
from codellama.eval.scoring import score
from codellama.eval.task import Generator, Task
from codellama.eval.tasks import PAPER_SUITE, Setting, make_task

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


@dataclass(frozen=True)
class Wanted:
    """One task at one setting."""

    task: str
    decoding: Decoding

    @property
    def folder(self) -> str:
        """The name of its folder: the task, and how it was sampled."""
        d = self.decoding
        return f"{self.task}-t{d.temperature:g}-n{d.n}" if d.temperature else self.task


@dataclass(frozen=True)
class Options:
    """How a run is done, the same for all its tasks."""

    limit: int | None = None
    workers: int = 2
    evalplus: bool = False


def wanted_of(
    tasks: Iterable[str], n: int | None, temperatures: Sequence[float], seed: int
) -> list[Wanted]:
    """The runs of named tasks: one sample is greedy, several are at the task's temperature.

    Among several temperatures 0 is one greedy sample, whatever `n` is.

    Raises:
        ValueError: no such task, or several samples at temperature 0.
    """
    n_of: dict[float | None, int] = {0.0: 1} if len(temperatures) > 1 else {}
    return [
        Wanted(name, Decoding.of(make_task(name), n_of.get(t, n or 1), t, seed))
        for name in tasks
        for t in temperatures or [None]
    ]


def paper_suite(n: int | None, seed: int) -> list[Wanted]:
    """All that the paper measures; `n` replaces its numbers of samples where there are several."""
    return [
        run
        for name, paper_n, temperature in PAPER_SUITE
        for run in wanted_of([name], n if n and paper_n > 1 else paper_n, [temperature], seed)
    ]


def evaluate(
    generator: Generator,
    wanted: Sequence[Wanted],
    folder: Path,
    model: dict[str, Any],
    setting: Setting,
    options: Options,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Sample and score every run, and write the report; returns the results in order.

    What cannot be done here (a missing data file, toolchain or judge, a model that does not
    infill) is skipped and said in its results, where several runs are wanted.

    Raises:
        ValueError: the only run cannot be done, or samples are wrong.
    """
    results = []
    prompts: dict[str, dict[str, str]] = {}
    with only_process(folder, "is evaluating into it"):
        for run in wanted:
            task = make_task(run.task, setting)
            place = folder / run.folder
            try:
                result = _evaluate(generator, task, place, run.decoding, model, options, progress)
                prompts.setdefault(task.name, {}).update(
                    (p.task_id, task.prompt(p).as_text())
                    for p in shown(task.problems()[: options.limit])
                )
            except ValueError as error:
                if len(wanted) == 1:
                    raise
                result = {"task": task.name, "skipped": str(error)}
                place.mkdir(parents=True, exist_ok=True)
            write_file(place / "results.json", json.dumps(result, indent=1) + "\n")
            results.append(result)
        write_report(folder, prompts)
    return results


def _evaluate(
    generator: Generator,
    task: Task,
    place: Path,
    decoding: Decoding,
    model: dict[str, Any],
    options: Options,
    progress: Progress | None,
) -> dict[str, Any]:
    if reason := task.unavailable():
        raise ValueError(f"{task.name}: {reason}")

    def told(what: str) -> Callable[[int, int], None] | None:
        return progress and partial(progress, f"{what} {task.name}")

    path = place / "samples.jsonl"
    settings = sample(generator, task, path, decoding, model, options.limit, told("sampling"))
    samples = read_samples(path, task, partial=options.limit is not None)
    if options.evalplus:
        write_samples(place / "samples.evalplus.jsonl", task, samples, evalplus=True)
    return score(task, samples, options.workers, told("scoring")) | {"settings": settings}
