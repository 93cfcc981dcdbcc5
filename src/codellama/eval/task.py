"""What a benchmark is: problems, how each is asked, and whether an answer is right.

A task samples nothing and reads no samples; what it cannot judge itself it says so.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from codellama.engine.endpoint import Endpoint
from codellama.engine.engine import Engine
from codellama.eval.datasets import DataFile, data_file
from codellama.eval.judges import Judge
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.chat import Message

Kind = Literal["complete", "infill", "chat", "score"]
Generator = Engine | Endpoint
"""What a model is asked through: in this process, or behind an address."""


@dataclass(frozen=True)
class Setting:
    """What a task may be given beside its name."""

    data: Path | None = None
    chat: bool = False
    """Ask in the chat format; for instruct models."""
    tokenizer: Tokenizer | None = None
    lengths: tuple[int, ...] = (8000, 16000, 24000)
    """Of key retrieval, in tokens."""
    judges: Mapping[str, Mapping[str, Judge]] = field(default_factory=dict)
    """By task and measure."""


@dataclass(frozen=True)
class Problem:
    """One problem of a benchmark."""

    task_id: str
    row: Mapping[str, Any]
    """As it stands in the data file."""
    group: str = ""
    """What results are also given by: a library, a difficulty, a language."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked for one problem.

    `text` is continued, `gap` filled, `messages` answered, and `texts` scored; one of them is set.
    """

    text: str | Sequence[int] = ""
    gap: tuple[str, str] | None = None
    messages: tuple[Message, ...] = ()
    texts: tuple[Any, ...] = ()
    suffix_first: bool = False
    """SPM, for a gap."""
    stop: tuple[str, ...] = ()
    max_tokens: int = 512
    may_lose_start: bool = False
    """A text longer than the context loses its beginning; otherwise it is not asked at all."""
    may_lose_end: bool = False
    """A text to be scored is cut at the context's end."""

    @classmethod
    def question(cls, content: str, max_tokens: int = 512) -> Prompt:
        """One message of a user."""
        return cls(messages=({"role": "user", "content": content},), max_tokens=max_tokens)

    @property
    def kind(self) -> Kind:
        """Which call of the generator this is."""
        if self.gap is not None:
            return "infill"
        return "score" if self.texts else "chat" if self.messages else "complete"

    def as_text(self) -> str:
        """The prompt for people to read."""
        if self.gap is not None:
            return f"{self.gap[0]}<FILL_ME>{self.gap[1]}"
        if self.messages:
            return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in self.messages)
        if self.texts:
            return "\n---\n".join(str(text) for text in self.texts)
        return self.text if isinstance(self.text, str) else f"({len(self.text)} token ids)"


@dataclass(frozen=True)
class Verdict:
    """What became of one sample."""

    status: str
    """`passed` or `failed`; for programs every status of a sandbox Outcome; `unjudged`."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Measures by name; `pass` is aggregated to pass@k, the others to their mean."""
    message: str = ""
    cpu_s: float = 0.0
    weight: float = 1.0
    """Of the values in their mean."""
    trust: Mapping[str, Any] = field(default_factory=dict)
    """Of a program: how it was isolated, and what else says how far its verdict can be trusted."""


@dataclass(frozen=True)
class Patience:
    """How much longer than a benchmark's limit its programs may take here."""

    cpu: float = 1.0
    """Times the limit, in processor time."""
    wall: float = 3.0
    """Times the limit, by the clock. HumanEval's own example must fail for sleeping 10 s."""


USUAL = Patience()


def graded(values: Mapping[str, float], first: str = "exact_match") -> Verdict:
    """A verdict from measures alone; it passed where the first is 1."""
    return Verdict("passed" if values[first] == 1 else "failed", values)


class Task:
    """One benchmark in one setting. Subclasses say what differs."""

    name: str
    file: str = ""
    """The data file whose rows are the problems."""
    id_form: str = "{number}"
    """A problem's id, from the fields of its row and the number of the row, from 0."""
    group_form: str = ""
    reference_field: str = ""
    """Of a row: a completion that must pass."""
    temperature: float = 0.8
    """At which more than one sample a problem is drawn; a single one is greedy."""
    top_p: float = 0.95
    known_broken: frozenset[str] = frozenset()
    """Problems whose own reference solution does not pass."""
    runs_programs: bool = False
    has_gaps: bool = False
    """Whether nothing at all can be a right answer."""
    protocol: str = ""
    """In one line, what was done where publications differ."""
    chat_protocol: str = ""
    """The same for the chat format, where the task has one."""

    def __init__(self, setting: Setting | None = None) -> None:
        self.setting = setting or Setting()
        self.protocol = (self.setting.chat and self.chat_protocol) or self.protocol
        self.files: dict[str, str] = {}
        """SHA-256 of the content of every data file read, by name."""

    def data_file(self, name: str) -> DataFile:
        """Find a data file and note its hash.

        Raises:
            ValueError: it is missing or wrong.
        """
        found = data_file(name, self.setting.data)
        self.files[name] = found.sha256
        return found

    def other_rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a file beside the one of the problems, which alone `--data FILE` replaces."""
        given = self.setting.data
        return data_file(name, given if given and given.is_dir() else None).rows()

    def load(self) -> Iterable[Problem]:
        """Read the problems, those for examples and checks alone included."""
        for number, raw in enumerate(self.data_file(self.file).rows()):
            row = self.read_row(raw)
            fields = {**row, "number": number}
            task_id = self.id_form.format_map(fields)
            yield Problem(task_id, row, self.group_form.format_map(fields))

    def read_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the file as the task uses it."""
        return row

    @cached_property
    def all_problems(self) -> list[Problem]:
        """What `load` reads, checked."""
        problems = list(self.load())
        seen: set[str] = set()
        for problem in problems:
            if problem.task_id in seen:
                raise ValueError(f"{self.name}: problem {problem.task_id!r} occurs twice")
            seen.add(problem.task_id)
        if not any(map(self.is_asked, problems)):
            raise ValueError(f"{self.name}: the data file holds no problems")
        return problems

    def is_asked(self, problem: Problem) -> bool:
        """Whether the problem belongs to the benchmark."""
        return True

    def problems(self) -> list[Problem]:
        """All problems, in the order of the file.

        Raises:
            ValueError: a data file is missing or wrong, or an id occurs twice.
        """
        return list(filter(self.is_asked, self.all_problems))

    def prompt(self, problem: Problem) -> Prompt:
        """What the model is asked."""
        raise NotImplementedError

    def trim(self, problem: Problem, text: str) -> str:
        """Cut generated text to the answer, as published; this is what a samples file holds."""
        return text

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Judge one answer."""
        raise NotImplementedError

    def reference_problems(self) -> list[Problem]:
        """Those whose references are checked; may be more than are asked."""
        return self.all_problems

    def reference(self, problem: Problem) -> str | None:
        """A completion that must pass, where the benchmark has one."""
        return problem.row[self.reference_field] if self.reference_field else None

    def solution(self, problem: Problem, completion: str) -> str:
        """The whole program, as EvalPlus stores it."""
        return completion

    def completion(self, problem: Problem, solution: str) -> str:
        """The completion that stands for a whole program of an EvalPlus file."""
        return solution

    def unavailable(self) -> str:
        """Why this task cannot be scored on this machine; empty where it can."""
        return ""


def cut(text: str, stops: Iterable[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def between(text: str, begin: str, end: str) -> str | None:
    """What stands between the first `begin` and the next `end` (or the end of the text)."""
    _, found, rest = text.partition(begin)
    return rest.partition(end)[0] if found else None


def fenced_code(text: str) -> str:
    """The code of a chat answer: its first fenced block, or all of it."""
    block = between(text, "```", "```")
    if block is None:
        return text
    language, newline, code = block.partition("\n")
    return code if newline and language.strip().replace("+", "").isalnum() else block.lstrip("\n")


def random_for(*parts: object) -> random.Random:
    """Random numbers that depend on nothing but these values, on every machine."""
    return random.Random(stable_seed(*parts))


def stable_seed(*parts: object) -> int:
    """A whole number below 2^48 from these values."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
