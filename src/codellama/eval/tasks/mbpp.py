"""MBPP: short Python functions from one sentence and three tests.

Base models get three examples; instruct models the zero-shot question with [PYTHON] tags. Source:
Austin et al. (arXiv 2108.07732) for split and format; Code Llama paper, table 2 and figure 13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from codellama.eval.execution import judge_python
from codellama.eval.task import (
    USUAL,
    Patience,
    Problem,
    Prompt,
    Task,
    Verdict,
    between,
    cut,
    fenced_code,
)

TEST_IDS = range(11, 511)  # google-research mbpp/README.md
SHOT_IDS = (2, 3, 4)
TIMEOUT_S = 10.0  # the slowest references need several seconds
_ASK = "You are an expert Python programmer, and here is your task: {text} {rest}:\n\n{tests}\n"
_PASS = "Your code should pass these tests"
_TAGS = "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag."


class Mbpp(Task):
    """The 500 test problems, or those of them in the hand-verified set."""

    runs_programs = True

    def __init__(
        self, data: Path | None = None, chat: bool = False, sanitized: bool = False
    ) -> None:
        super().__init__()
        self.name = "mbpp-sanitized" if sanitized else "mbpp"
        self.file = "mbpp/sanitized-mbpp.json.gz" if sanitized else "mbpp/mbpp.jsonl.gz"
        self._data, self._chat = data, chat
        self._rows: list[dict[str, Any]] = []
        if not sanitized:  # their own tests do not hold
            self.known_broken = frozenset(f"Mbpp/{number}" for number in (123, 367, 927))
        self.protocol = "zero-shot, [PYTHON] tags" if chat else "3-shot with tasks 2, 3, 4"

    def load(self) -> Iterable[Problem]:
        """The problems of the test split."""
        return [p for p in self.reference_problems() if p.row["task_id"] in TEST_IDS]

    def reference_problems(self) -> list[Problem]:
        """The problems of every split."""
        if not self._rows:
            found = self.data_file(self.file, self._data)
            self._rows = found.rows()
        return [Problem(f"Mbpp/{row['task_id']}", row) for row in self._rows]

    def prompt(self, problem: Problem) -> Prompt:
        """Three solved tasks and this one; or the zero-shot question."""
        if self._chat:
            question = _question(problem.row) + _TAGS
            return Prompt(messages=({"role": "user", "content": question},))
        shots = [p.row for p in self.reference_problems() if p.row["task_id"] in SHOT_IDS]
        solved = [f"{_question(row)}[BEGIN]\n{_plain(row['code'])}\n[DONE]\n\n" for row in shots]
        return Prompt("".join(solved) + _question(problem.row) + "[BEGIN]\n", stop=("[DONE]",))

    def trim(self, problem: Problem, text: str) -> str:
        """Up to [DONE]; of a chat answer, what stands between the tags."""
        if not self._chat:
            return cut(text, ["[DONE]"])
        tagged = between(text, "[PYTHON]", "[/PYTHON]")
        return fenced_code(text if tagged is None else tagged)

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Run the three asserts."""
        row = problem.row
        setup = "\n".join([row.get("test_setup_code", ""), *row.get("test_imports", [])])
        # As published, the set-up stands before the candidate; here the tests have it too.
        candidate = f"{setup}\n{completion}\n"
        tests = "\n".join(row["test_list"])
        return judge_python(candidate, tests, TIMEOUT_S, patience, setup)

    def reference(self, problem: Problem) -> str:
        """The benchmark's own solution."""
        return problem.row["code"]


def _question(row: Mapping[str, Any]) -> str:
    text = row.get("text") or row["prompt"]  # the sanitized file calls it prompt
    return _ASK.format(text=_plain(text), rest=_PASS, tests=_plain("\n".join(row["test_list"])))


def _plain(text: str) -> str:
    """Without the carriage returns of the file."""
    return text.replace("\r\n", "\n").strip()
