"""Measuring a checkpoint on the held-out problems, and on what it refuses.

In: held_out.jsonl of a run, a checkpoint. Out: samples and results in the evaluation's formats, so
that `codellama compare` says whether two checkpoints differ by more than chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from codellama.artifact import write_file
from codellama.eval.samples import read_samples
from codellama.eval.sampling import Decoding, fingerprint, sample
from codellama.eval.scoring import score
from codellama.eval.task import Setting, Task
from codellama.eval.tasks import make_task
from codellama.selfinstruct.solutions import HeldOut
from codellama.selfinstruct.steps import Run


def measure(
    run: Run, checkpoint: Path, generator: Any, chat: bool, n: int = 20
) -> list[dict[str, Any]]:
    """pass@k of the held-out problems with intervals, and refusals of XSTest where it is there.

    Args:
        chat: ask in the chat format; otherwise code to continue.
        n: samples a problem; 20 give pass@10 with less noise than 10.

    Raises:
        ValueError: there are no held-out problems, or samples were made with other settings.
    """
    problems = run.rows("held_out")
    if not problems:
        raise ValueError(f"{run.path('held_out')}: no held-out problems; run the step verify first")
    setting = Setting(chat=chat)
    tasks: list[tuple[Task, int]] = [(HeldOut(problems, setting, run.settings.timeout_s), n)]
    try:
        (xstest := make_task("xstest", setting)).problems()
        tasks.append((xstest, 1))
    except (ValueError, OSError) as error:
        run.say(f"xstest: left out: {error}")
    path = checkpoint.absolute()
    name = path.parent.name if path.name == "checkpoint" else path.name  # runs/STAGE/checkpoint
    model = {"name": name, "sha256": fingerprint(path), "chat": chat}
    folder = run.folder / "measured" / f"{name}-{'chat' if chat else 'code'}"
    results = []
    for task, n_samples in tasks:
        path = folder / task.name / "samples.jsonl"
        settings = sample(generator, task, path, Decoding.of(task, n_samples), model)
        results.append(score(task, read_samples(path, task)) | {"settings": settings})
        write_file(path.with_name("results.json"), json.dumps(results[-1], indent=1) + "\n")
    return results
