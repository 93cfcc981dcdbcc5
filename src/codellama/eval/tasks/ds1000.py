"""DS-1000: data science with seven libraries.

A problem's tests hold the program that the answer becomes part of, and share its process, because
they compare frames and figures. Source: arXiv 2211.11501, the simplified file of 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from codellama.eval.execution import missing_modules, run_program
from codellama.eval.task import USUAL, Patience, Problem, Prompt, Task, Verdict, cut, fenced_code

FILE = "ds1000/ds1000.jsonl.gz"
STOPS = ("</code>", "# SOLUTION END", "END SOLUTION")
TIMEOUT_S = 60.0
MODULES = ("numpy", "pandas", "scipy", "sklearn", "matplotlib")
_ASK = "Answer with only the missing code, in one block.\n\n{prompt}"


class Ds1000(Task):
    """1,000 problems; the answer must pass its tests and use what the problem asks for."""

    name = "ds1000"
    runs_programs = True

    def __init__(self, data: Path | None = None, chat: bool = False) -> None:
        super().__init__()
        self._data, self._chat = data, chat
        self.protocol = "completion; tests share the answer's process, as published"

    def load(self) -> Iterable[Problem]:
        """Read the problems."""
        found = self.data_file(FILE, self._data)
        for row in found.rows():
            facts = row["metadata"]
            yield Problem(f"DS-1000/{facts['problem_id']}", row, facts["library"])

    def prompt(self, problem: Problem) -> Prompt:
        """The question up to where the code begins."""
        text = problem.row["prompt"]
        if self._chat:
            question = _ASK.format(prompt=text)
            return Prompt(messages=({"role": "user", "content": question},), max_tokens=1024)
        return Prompt(text, stop=STOPS, max_tokens=1024)

    def trim(self, problem: Problem, text: str) -> str:
        """Up to the end of the code."""
        return cut(fenced_code(text) if self._chat else text, STOPS)

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Run the tests of the problem."""
        context = problem.row["code_context"]
        calls = f"\nanswer = {completion!r}\ntest_execution(answer)\n"
        if "def test_string(" in context:
            calls += "test_string(answer)\n"
        return run_program(context + calls, "python", TIMEOUT_S, patience)

    def reference(self, problem: Problem) -> str:
        """The benchmark's own solution."""
        return problem.row["reference_code"]

    def unavailable(self) -> str:
        """The libraries that are missing."""
        return missing_modules(MODULES)
