"""MultiPL-E: HumanEval in other languages, and its single-line infilling task.

Source: Code Llama paper, tables 4 and 6; MultiPL-E (arXiv 2208.08227); the infilling task is
SantaCoder's (arXiv 2301.03988).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from codellama.eval.datasets import data_file
from codellama.eval.execution import judge_python, missing_toolchain, run_program
from codellama.eval.metrics import exact_match
from codellama.eval.task import (
    USUAL,
    Patience,
    Problem,
    Prompt,
    Task,
    Verdict,
    cut,
    fenced_code,
    graded,
)

# Of the data files: the name of the language in the sandbox.
LANGUAGES = {
    "cpp": "cpp",
    "java": "java",
    "php": "php",
    "ts": "typescript",
    "cs": "csharp",
    "sh": "bash",
    "js": "javascript",
    "py": "python",
}
INFILLING_FILE = "multipl-e-fim/single-line-infilling.jsonl.gz"
TIMEOUT_S = 15.0  # MultiPL-E's
_ASK = (
    "Complete this {language} code. Answer with all of it in one block of code.\n\n```\n{prompt}```"
)


class MultiplE(Task):
    """HumanEval translated to one language, the "reworded" prompts."""

    runs_programs = True

    def __init__(self, language: str, data: Path | None = None, chat: bool = False) -> None:
        super().__init__()
        self.name = f"multipl-e-{language}"
        self.file = f"multipl-e/humaneval-{language}-reworded.jsonl.gz"
        self._language, self._data, self._chat = language, data, chat
        self._solutions: dict[str, str] | None = None
        self.protocol = "zero-shot" + (", chat format with our own question" if chat else "")

    def load(self) -> Iterable[Problem]:
        """Read the problems."""
        found = self.data_file(self.file, self._data)
        for row in found.rows():
            yield Problem(row["name"], row)

    def prompt(self, problem: Problem) -> Prompt:
        """The header in the language, or a question that holds it."""
        text = problem.row["prompt"]
        if self._chat:
            question = _ASK.format(language=LANGUAGES[self._language], prompt=text)
            return Prompt(messages=({"role": "user", "content": question},), max_tokens=1024)
        return Prompt(text, stop=tuple(problem.row["stop_tokens"]))

    def trim(self, problem: Problem, text: str) -> str:
        """Up to the first stop token of the language."""
        if self._chat:
            code = fenced_code(text)
            header = problem.row["prompt"].rstrip().rpartition("\n")[2].strip()
            text = code.partition(header)[2] if header and header in code else code
        return cut(text, problem.row["stop_tokens"])

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Compile and run with the tests."""
        row = problem.row
        program = row["prompt"] + completion + "\n"
        if self._language == "py":
            return judge_python(program, row["tests"], TIMEOUT_S, patience)
        return run_program(program + row["tests"], LANGUAGES[self._language], TIMEOUT_S, patience)

    def reference_problems(self) -> list[Problem]:
        """Those with a known solution: in the infilling file, for Java, JavaScript and Python."""
        return [p for p in self.problems() if self.reference(p) is not None]

    def reference(self, problem: Problem) -> str | None:
        """A model's correct solution, put together from the infilling file."""
        if self._language not in ("java", "js", "py"):
            return None
        if self._solutions is None:
            given = self._data if self._data is None or self._data.is_dir() else None
            self._solutions = {}
            for row in data_file(INFILLING_FILE, given).rows():
                name = row["name"].removeprefix("humaneval-").partition(".json")[0]
                if row["language"] == self._language:
                    self._solutions.setdefault(name, _whole(row, row["canonical_solution"]))
        whole = self._solutions.get(problem.task_id, "")
        # The infilling prompts were translated at another time; some differ in a comment.
        header = problem.row["prompt"].rstrip().rpartition("\n")[2]
        if self._language == "py":
            header = f"def {self._function(problem)}("
            _, found, rest = whole.partition(header)
            return f"    pass\n{header}{rest}" if found else None
        _, found, rest = whole.partition(header)
        # The tests close what the solution leaves open.
        return cut(rest, problem.row["stop_tokens"]) if found else None

    def solution(self, problem: Problem, completion: str) -> str:
        """Header and body."""
        return problem.row["prompt"] + completion

    def unavailable(self) -> str:
        """The missing compiler or interpreter."""
        return missing_toolchain(LANGUAGES[self._language])

    def _function(self, problem: Problem) -> str:
        return problem.task_id.split("_", 2)[2]


class MultiplEInfilling(Task):
    """One missing line in Java, JavaScript and Python; exact match."""

    def __init__(self, data: Path | None = None, suffix_first: bool = False) -> None:
        super().__init__()
        order = "SPM" if suffix_first else "PSM"
        self.name = f"multipl-e-infilling-{order.lower()}"
        self._data, self._suffix_first = data, suffix_first
        self.protocol = f"{order}, first line that is not empty, white space around it ignored"

    def load(self) -> Iterable[Problem]:
        """Read the gaps; names occur once a language."""
        found = self.data_file(INFILLING_FILE, self._data)
        for row in found.rows():
            yield Problem(f"{row['language']}/{row['name']}", row, row["language"])

    def prompt(self, problem: Problem) -> Prompt:
        """The gap."""
        gap = (problem.row["prompt"], problem.row["suffix"])
        return Prompt(gap=gap, suffix_first=self._suffix_first, max_tokens=96)

    def trim(self, problem: Problem, text: str) -> str:
        """The first line with something on it."""
        return text.strip().partition("\n")[0].rstrip()

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Compare with the line that was there."""
        return graded({"exact_match": exact_match(completion, self.reference(problem))})

    def reference(self, problem: Problem) -> str:
        """The line that was there."""
        return problem.row["canonical_solution"]


def _whole(row: dict[str, str], line: str) -> str:
    """The program around a gap; the file leaves out the line ends at its borders."""
    before = row["prompt"] + ("" if row["prompt"].endswith("\n") else "\n")
    after = row["suffix"] if row["suffix"].startswith("\n") else "\n" + row["suffix"]
    return before + line + after
