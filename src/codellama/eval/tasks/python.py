"""Python programs from a description: MBPP, APPS and DS-1000.

Base models get examples in the prompt (DS-1000 has none), instruct models a question. Sources: MBPP
(arXiv 2108.07732) for split and format, Code Llama paper, table 2 and figure 13; table 3, figure 14
and appendix F for APPS; DS-1000 (arXiv 2211.11501), the simplified file of 2024.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from codellama.eval.execution import (
    END,
    SCIENTIFIC,
    judge_python,
    missing_modules,
    run_cases,
    run_program,
)
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

MBPP_TEST_IDS = range(11, 511)  # google-research mbpp/README.md
MBPP_SHOT_IDS = (2, 3, 4)
MBPP_TIMEOUT_S = 10.0  # the slowest references need several seconds
_MBPP_ASK = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n"
)
_TAGS = "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag."

APPS_SHOT_IDS = ("0111", "4184")  # one by standard input, one by a call; short solutions
APPS_TIMEOUT_S = 4.0  # a test, as in the APPS repository
_APPS_ASK = (
    "Write Python code that solves the following problem. It must obey the constraints and pass "
    "the example test cases. {guide}. Wrap your code in '''.\n\n{question}\n"
)
_GUIDES = ("Read from and write to standard IO", "Use the provided function signature")

DS1000_STOPS = ("</code>", "# SOLUTION END", "END SOLUTION")
DS1000_TIMEOUT_S = 60.0
DS1000_MODULES = ("numpy", "pandas", "scipy", "sklearn", "matplotlib")
DS1000_LARGE = {"Pytorch": ("torch",), "Tensorflow": ("tensorflow",)}
_DS1000_ASK = "Answer with only the missing code, in one block.\n\n{prompt}"


class Mbpp(Task):
    """Short functions from one sentence and three tests: the 500 test problems."""

    name = "mbpp"
    file = "mbpp/mbpp.jsonl.gz"
    id_form = "Mbpp/{task_id}"
    reference_field = "code"
    protocol = "3-shot with tasks 2, 3, 4"
    chat_protocol = "zero-shot, [PYTHON] tags"
    runs_programs = True
    known_broken = frozenset(("Mbpp/123",))  # needs its whole limit

    def is_asked(self, problem: Problem) -> bool:
        """Those of the test split; references of every split are checked."""
        return problem.row["task_id"] in MBPP_TEST_IDS

    def prompt(self, problem: Problem) -> Prompt:
        """Three solved tasks and this one; or the zero-shot question."""
        if self.setting.chat:
            return Prompt.question(_mbpp_question(problem.row) + _TAGS)
        shots = [p.row for p in self.all_problems if p.row["task_id"] in MBPP_SHOT_IDS]
        solved = [
            f"{_mbpp_question(row)}[BEGIN]\n{_plain(row['code'])}\n[DONE]\n\n" for row in shots
        ]
        text = "".join(solved) + _mbpp_question(problem.row) + "[BEGIN]\n"
        return Prompt(text, stop=("[DONE]",))

    def trim(self, problem: Problem, text: str) -> str:
        """Up to [DONE]; of a chat answer, what stands between the tags."""
        if not self.setting.chat:
            return cut(text, ["[DONE]"])
        tagged = between(text, "[PYTHON]", "[/PYTHON]")
        return fenced_code(text if tagged is None else tagged)

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Run the three asserts."""
        row = problem.row
        imports = "\n".join(row.get("test_imports", []))  # as published, before the candidate
        setup = f"{imports}\n{row.get('test_setup_code', '')}"  # makes objects of its classes
        candidate = f"{imports}\n{completion}\n"
        tests = "\n".join(row["test_list"])
        return judge_python(candidate, tests, MBPP_TIMEOUT_S, patience, setup)


class MbppSanitized(Mbpp):
    """The test problems that are in the hand-verified set."""

    name = "mbpp-sanitized"
    file = "mbpp/sanitized-mbpp.json.gz"
    known_broken = frozenset[str]()


def _mbpp_question(row: Mapping[str, Any]) -> str:
    text = row.get("text") or row["prompt"]  # the sanitized file calls it prompt
    return _MBPP_ASK.format(text=_plain(text), tests=_plain("\n".join(row["test_list"])))


def _plain(text: str) -> str:
    """Without the carriage returns of the file."""
    return text.replace("\r\n", "\n").strip()


class Apps(Task):
    """Programming contests, by standard input or by a call; every test must pass ("strict")."""

    name = "apps"
    file = "apps/apps-train-sample.jsonl.gz"
    id_form = "APPS/{problem_id}"
    group_form = "{difficulty}"
    protocol = "2-shot; without --data 3 training problems, where the paper asks 5,000 test ones"
    chat_protocol = "zero-shot, chat format"
    temperature = 0.6  # Code Llama paper, table 3
    runs_programs = True

    def load(self) -> Iterable[Problem]:
        """Those of the file that have tests."""
        return [p for p in super().load() if p.row["input_output"].get("inputs")]

    def read_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Its nested values as values; the original file holds them as JSON text."""
        parsed = dict(row)
        for key in ("input_output", "solutions"):
            if isinstance(parsed.get(key), str):
                parsed[key] = json.loads(parsed[key]) if parsed[key] else {}
        return parsed

    def is_asked(self, problem: Problem) -> bool:
        """The examples are no problems."""
        return problem.row["problem_id"] not in APPS_SHOT_IDS

    def prompt(self, problem: Problem) -> Prompt:
        """Two examples as questions and answers, and the problem."""
        if self.setting.chat:
            return Prompt.question(_apps_question(problem.row), max_tokens=1024)
        shots = {row["problem_id"]: self.read_row(row) for row in self.other_rows(self.file)}
        parts = [
            f"Q: {_apps_question(shots[i])}\nA: '''\n{shots[i]['solutions'][0].strip()}\n'''\n\n"
            for i in APPS_SHOT_IDS
        ]
        text = "".join(parts) + f"Q: {_apps_question(problem.row)}\nA:"
        return Prompt(text, stop=("\nQ:",), max_tokens=1024)

    def trim(self, problem: Problem, text: str) -> str:
        """What stands between the quotes."""
        quoted = between(text, "'''", "'''")
        if quoted is not None:
            return quoted.lstrip("\n")
        return fenced_code(text) if self.setting.chat else cut(text, ["\nQ:"])

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Run every test."""
        tests = problem.row["input_output"]
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
        if "fn_name" not in tests:
            cases = [(_text(i), _text(o)) for i, o in pairs]
            return run_cases(completion, cases, APPS_TIMEOUT_S, patience)
        name = tests["fn_name"]
        # LeetCode's problems want a method of a class; it is called as a function.
        method = f"\nif 'Solution' in globals():\n    {name} = Solution().{name}\n"
        candidate = "from typing import *\n" + completion + method
        # Some files wrap the expected value in a list of its own.
        lines = [
            f"got = {name}(*{i!r})\ngot = list(got) if isinstance(got, tuple) else got\n"
            f"assert got == {o!r} or [got] == {o!r}\n"
            for i, o in pairs
        ]
        return judge_python(candidate, "".join(lines), APPS_TIMEOUT_S * len(lines), patience)

    def reference(self, problem: Problem) -> str | None:
        """The first published solution."""
        solutions = problem.row["solutions"]
        return solutions[0] if solutions else None


def _apps_question(row: Mapping[str, Any]) -> str:
    guide = _GUIDES["fn_name" in row["input_output"]]
    question = row["question"].strip()
    if row["starter_code"]:
        question += "\n\n" + row["starter_code"].rstrip()
    return _APPS_ASK.format(guide=guide, question=question)


def _text(value: Any) -> str:
    """A test's text; some files hold a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else value


class Ds1000(Task):
    """Data science with seven libraries, 1,000 problems; those of missing large ones go unjudged.

    The tests hold the program that the answer becomes part of, and share its process, because they
    compare frames and figures; some also look for what the answer must use.
    """

    name = "ds1000"
    file = "ds1000/ds1000.jsonl.gz"
    id_form = "DS-1000/{metadata[problem_id]}"
    group_form = "{metadata[library]}"
    reference_field = "reference_code"
    protocol = "completion; tests share the answer's process, as published"
    runs_programs = True

    def reference_problems(self) -> list[Problem]:
        """Those that can be run here."""
        return [p for p in self.problems() if not self._missing(p)]

    def _missing(self, problem: Problem) -> str:
        return missing_modules(DS1000_LARGE.get(problem.group, ()))

    def prompt(self, problem: Problem) -> Prompt:
        """The question up to where the code begins."""
        text = problem.row["prompt"]
        if self.setting.chat:
            return Prompt.question(_DS1000_ASK.format(prompt=text), max_tokens=1024)
        return Prompt(text, stop=DS1000_STOPS, max_tokens=1024)

    def trim(self, problem: Problem, text: str) -> str:
        """Up to the end of the code."""
        return cut(fenced_code(text) if self.setting.chat else text, DS1000_STOPS)

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Run the tests of the problem, where its library is installed."""
        if reason := self._missing(problem):
            return Verdict("unjudged", {}, reason)
        context = problem.row["code_context"]
        calls = f"\nanswer = {completion!r}\ntest_execution(answer)\n"
        if "def test_string(" in context:
            calls += "test_string(answer)\n"
        calls += f"print({END!r})\n"
        return run_program(context + calls, "python", DS1000_TIMEOUT_S, patience, **SCIENTIFIC)

    def unavailable(self) -> str:
        """The libraries that are missing."""
        return missing_modules(DS1000_MODULES)
