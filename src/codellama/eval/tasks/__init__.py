"""The benchmarks, one file a family; `make_task` finds one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from codellama.eval.judges import Judge
from codellama.eval.task import Task
from codellama.eval.tasks.apps import Apps
from codellama.eval.tasks.context import BitsPerByte, Encoder, KeyRetrieval, PerplexityByPosition
from codellama.eval.tasks.ds1000 import Ds1000
from codellama.eval.tasks.humaneval import (
    INFILLING_FILES,
    HumanEval,
    HumanEvalInfilling,
    HumanEvalPlus,
)
from codellama.eval.tasks.language import (
    Bold,
    Gsm8k,
    ToxiGen,
    TruthfulQa,
    TruthfulQaChoice,
    XsTest,
)
from codellama.eval.tasks.lines import LINE_FILES, Docstrings, LineCompletion
from codellama.eval.tasks.mbpp import Mbpp
from codellama.eval.tasks.multipl_e import LANGUAGES, MultiplE, MultiplEInfilling


@dataclass(frozen=True)
class Setting:
    """What a task may be given beside its name."""

    data: Path | None = None
    chat: bool = False
    """Ask in the chat format; for instruct models."""
    tokenizer: Encoder | None = None
    lengths: tuple[int, ...] = (8000, 16000, 24000)
    """Of key retrieval, in tokens."""
    judges: Mapping[str, Mapping[str, Judge]] = field(default_factory=dict)
    """By task and measure."""


def _table() -> dict[str, Callable[[Setting], Task]]:
    makers: dict[str, Callable[[Setting], Task]] = {
        "humaneval": lambda s: HumanEval(s.data, s.chat),
        "humaneval+": lambda s: HumanEvalPlus(s.data, s.chat),
        "mbpp": lambda s: Mbpp(s.data, s.chat),
        "mbpp-sanitized": lambda s: Mbpp(s.data, s.chat, sanitized=True),
        "apps": lambda s: Apps(s.data, s.chat),
        "ds1000": lambda s: Ds1000(s.data, s.chat),
        "docstrings": lambda s: Docstrings(s.data),
        "gsm8k": lambda s: Gsm8k(s.data, s.chat),
        "truthfulqa-mc": lambda s: TruthfulQaChoice(s.data),
        "key-retrieval": lambda s: KeyRetrieval(s.tokenizer, s.lengths, s.data),
        "perplexity": lambda s: PerplexityByPosition(s.data),
        "bits-per-byte": lambda s: BitsPerByte(s.data),
    }
    for language in LANGUAGES:
        makers[f"multipl-e-{language}"] = lambda s, of=language: MultiplE(of, s.data, s.chat)
    for name in LINE_FILES:
        makers[name] = lambda s, of=name: LineCompletion(of, s.data)
    for order, spm in (("psm", False), ("spm", True)):
        makers[f"multipl-e-infilling-{order}"] = lambda s, spm=spm: MultiplEInfilling(s.data, spm)
        for kind in INFILLING_FILES:
            makers[f"humaneval-{kind}-{order}"] = lambda s, kind=kind, spm=spm: HumanEvalInfilling(
                kind, s.data, spm
            )
    for judged in (TruthfulQa, ToxiGen, Bold, XsTest):
        makers[judged.name] = lambda s, of=judged: of(s.data, s.chat, s.judges.get(of.name))
    return makers


TASKS = _table()

# What the paper measures, in its order: task, samples a problem, temperature (0 is greedy).
# The sampled runs of HumanEval are those of figure 6; the best temperature is reported for each k.
PAPER_SUITE: tuple[tuple[str, int, float], ...] = (
    ("humaneval", 1, 0.0),
    *(("humaneval", 200, temperature) for temperature in (0.1, 0.4, 0.6, 0.8)),
    ("mbpp", 1, 0.0),
    ("mbpp", 200, 0.8),
    ("apps", 100, 0.6),
    *((f"multipl-e-{language}", 1, 0.0) for language in ("cpp", "java", "php", "ts", "cs", "sh")),
    *(
        (f"humaneval-{kind}-{order}", 1, 0.0)
        for kind in ("single-line", "multi-line", "random-span-light")
        for order in ("psm", "spm")
    ),
    ("multipl-e-infilling-psm", 1, 0.0),
    ("multipl-e-infilling-spm", 1, 0.0),
    ("docstrings", 1, 0.0),
    ("lcc", 1, 0.0),
    ("key-retrieval", 1, 0.0),
    ("gsm8k", 1, 0.0),
    ("truthfulqa", 1, 0.1),
    ("toxigen", 1, 0.1),
    ("bold", 1, 0.1),
    ("xstest", 1, 0.0),
)


# Those with reference solutions that are programs: what `score --check` goes through.
REFERENCE_TASKS = (
    "humaneval",
    "humaneval+",
    "mbpp",
    "mbpp-sanitized",
    "humaneval-single-line-psm",
    "humaneval-multi-line-psm",
    "humaneval-random-span-light-psm",
    "multipl-e-py",
    "multipl-e-js",
    "multipl-e-java",
    "apps",
    "ds1000",
)


def make_task(name: str, setting: Setting | None = None) -> Task:
    """A task by its name.

    Raises:
        ValueError: no such task; the message lists them.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name](setting or Setting())
