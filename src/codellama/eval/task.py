"""What a benchmark is: problems, how each is asked, and whether an answer is right.

A task samples nothing and reads no samples; what it cannot judge itself it says so.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from codellama.engine.sampling import SamplingParams
from codellama.engine.sequence import Completion
from codellama.eval.datasets import DataFile, data_file
from codellama.tokenizer.chat import Message

Kind = Literal["complete", "infill", "chat", "score"]


class Generator(Protocol):
    """What a model is asked through: the Engine in this process, or one behind an address."""

    def complete(
        self, prompts: Sequence[Any], params: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue texts or ids."""
        ...

    def infill(
        self,
        gaps: Sequence[tuple[str, str]],
        params: Sequence[SamplingParams],
        suffix_first: bool = False,
    ) -> list[Completion]:
        """Write what stands between each prefix and suffix."""
        ...

    def chat(
        self, dialogs: Sequence[Sequence[Message]], params: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answer dialogs."""
        ...

    def score(self, prompts: Sequence[Any]) -> list[list[float]]:
        """Natural log-probabilities of each token after the first."""
        ...


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


@dataclass(frozen=True)
class Patience:
    """How much longer than a benchmark's limit its programs may take here."""

    cpu: float = 1.0
    """Times the limit, in processor time."""
    wall: float = 3.0
    """Times that, by the clock. A program that sleeps 10 s fails HumanEval's own example."""


USUAL = Patience()


def graded(values: Mapping[str, float], first: str = "exact_match") -> Verdict:
    """A verdict from measures alone; it passed where the first is 1."""
    return Verdict("passed" if values[first] == 1 else "failed", values)


class Task:
    """One benchmark in one setting. Subclasses say what differs."""

    name: str
    temperature: float = 0.8
    """At which more than one sample a problem is drawn; a single one is greedy."""
    top_p: float = 0.95
    known_broken: frozenset[str] = frozenset()
    """Problems whose own reference solution does not pass."""
    runs_programs: bool = False
    protocol: str = ""
    """In one line, what was done where publications differ."""

    def __init__(self) -> None:
        self._problems: list[Problem] | None = None
        self.files: dict[str, str] = {}
        """SHA-256 of the content of every data file read, by name."""

    def data_file(self, name: str, given: Path | None) -> DataFile:
        """Find a data file and note its hash.

        Raises:
            ValueError: it is missing or wrong.
        """
        found = data_file(name, given)
        self.files[name] = found.sha256
        return found

    def load(self) -> Iterable[Problem]:
        """Read the problems."""
        raise NotImplementedError

    def problems(self) -> list[Problem]:
        """All problems, in the order of the file.

        Raises:
            ValueError: a data file is missing or wrong, or an id occurs twice.
        """
        if self._problems is None:
            problems = list(self.load())
            seen: set[str] = set()
            for problem in problems:
                if problem.task_id in seen:
                    raise ValueError(f"{self.name}: problem {problem.task_id!r} occurs twice")
                seen.add(problem.task_id)
            if not problems:
                raise ValueError(f"{self.name}: the data file holds no problems")
            self._problems = problems
        return self._problems

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
        return self.problems()

    def reference(self, problem: Problem) -> str | None:
        """A completion that must pass, where the benchmark has one."""
        return None

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


Loader = Callable[[], Task]
