"""APPS: programming contests, by standard input or by a call.

Two-shot for base models, zero-shot chat for instruct models. Source: Code Llama paper, table 3,
figure 14 and appendix F. The example problems are two of the training set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from codellama.eval.datasets import data_file
from codellama.eval.execution import judge_python, run_cases
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

FILE = "apps/apps-train-sample.jsonl.gz"
SHOT_IDS = ("0111", "4184")  # one by standard input, one by a call; both have short solutions
TIMEOUT_S = 4.0  # a test, as in the APPS repository
_ASK = (
    "Write Python code that solves the following problem. It must obey the constraints and pass "
    "the example test cases. {guide}. Wrap your code in '''.\n\n{question}\n"
)
_GUIDES = ("Read from and write to standard IO", "Use the provided function signature")


class Apps(Task):
    """Contest problems; one is solved when every test passes ("strict accuracy")."""

    name = "apps"
    temperature = 0.6  # Code Llama paper, table 3
    runs_programs = True

    def __init__(self, data: Path | None = None, chat: bool = False) -> None:
        super().__init__()
        self._data, self._chat = data, chat
        self.protocol = "zero-shot, chat format" if chat else "2-shot, examples of the training set"

    def load(self) -> Iterable[Problem]:
        """Read the problems; the examples are no problems."""
        return [p for p in self.reference_problems() if p.row["problem_id"] not in SHOT_IDS]

    def reference_problems(self) -> list[Problem]:
        """Those of the file that have tests."""
        found = self.data_file(FILE, self._data)
        rows = [_parsed(row) for row in found.rows()]
        return [
            Problem(f"APPS/{row['problem_id']}", row, row["difficulty"])
            for row in rows
            if row["input_output"].get("inputs")
        ]

    def prompt(self, problem: Problem) -> Prompt:
        """Two examples as questions and answers, and the problem."""
        if self._chat:
            message: Any = {"role": "user", "content": _question(problem.row)}
            return Prompt(messages=(message,), max_tokens=1024)
        given = self._data if self._data is not None and self._data.is_dir() else None
        shots = {row["problem_id"]: _parsed(row) for row in data_file(FILE, given).rows()}
        parts = [
            f"Q: {_question(shots[i])}\nA: '''\n{shots[i]['solutions'][0].strip()}\n'''\n\n"
            for i in SHOT_IDS
        ]
        text = "".join(parts) + f"Q: {_question(problem.row)}\nA:"
        return Prompt(text, stop=("\nQ:",), max_tokens=1024)

    def trim(self, problem: Problem, text: str) -> str:
        """What stands between the quotes."""
        quoted = between(text, "'''", "'''")
        if quoted is not None:
            return quoted.lstrip("\n")
        return fenced_code(text) if self._chat else cut(text, ["\nQ:"])

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Run every test."""
        tests = problem.row["input_output"]
        if "fn_name" not in tests:
            cases = [(_text(i), _text(o)) for i, o in _pairs(tests)]
            return run_cases(completion, cases, TIMEOUT_S, patience)
        name = tests["fn_name"]
        # LeetCode's problems want a method of a class; it is called as a function.
        method = f"\nif 'Solution' in globals():\n    {name} = Solution().{name}\n"
        candidate = "from typing import *\n" + completion + method
        # Some files wrap the expected value in a list of its own.
        lines = [
            f"got = {name}(*{i!r})\ngot = list(got) if isinstance(got, tuple) else got\n"
            f"assert got == {o!r} or [got] == {o!r}\n"
            for i, o in _pairs(tests)
        ]
        return judge_python(candidate, "".join(lines), TIMEOUT_S * len(lines), patience)

    def reference(self, problem: Problem) -> str | None:
        """The first published solution."""
        solutions = problem.row["solutions"]
        return solutions[0] if solutions else None


def _parsed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose nested values are values; the original file holds them as JSON text."""
    parsed = dict(row)
    for key in ("input_output", "solutions"):
        if isinstance(parsed.get(key), str):
            parsed[key] = json.loads(parsed[key]) if parsed[key] else {}
    return parsed


def _question(row: Mapping[str, Any]) -> str:
    guide = _GUIDES["fn_name" in row["input_output"]]
    question = row["question"].strip()
    if row["starter_code"]:
        question += "\n\n" + row["starter_code"].rstrip()
    return _ASK.format(guide=guide, question=question)


def _pairs(tests: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return list(zip(tests["inputs"], tests["outputs"], strict=True))


def _text(value: Any) -> str:
    """A test's text; some files hold a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else value
