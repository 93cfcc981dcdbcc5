"""MultiPL-E: HumanEval in other languages, and its single-line infilling task.

Source: Code Llama paper, tables 4 and 6; MultiPL-E (arXiv 2208.08227); the infilling task is
SantaCoder's (arXiv 2301.03988).
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

from codellama.eval.execution import END, judge_python, missing_toolchain, run_program
from codellama.eval.metrics import exact_match
from codellama.eval.task import (
    USUAL,
    Patience,
    Problem,
    Prompt,
    Setting,
    Task,
    Verdict,
    cut,
    fenced_code,
    graded,
)
from codellama.sandbox.languages import JAVATUPLES, find_language

LANGUAGES = ("cpp", "java", "php", "ts", "cs", "sh", "js", "py")  # as the data files say
INFILLING_FILE = "multipl-e-fim/single-line-infilling.jsonl.gz"
TIMEOUT_S = 15.0  # MultiPL-E's
_ASSERT = re.compile(r"\bDebug\.Assert\((.*)\);$", re.M)
# What the tests end with, by language, and what stands there instead.
_SAY_END = {
    "cpp": (r"\}\s*\Z", f'std::puts("{END}");}}'),
    "cs": (r"\}\s*\}\s*\Z", f'System.Console.WriteLine("{END}");}}}}'),
    # The class of the file's name is the one that is started.
    "java": (
        r"\Z",
        "class Main { public static void main(String[] a) { Problem.main(a); "
        f'System.out.println("{END}"); }} }}',
    ),
    "php": (r"\Z", f'\necho "{END}";'),
    "sh": (r"\Z", f'\necho "{END}"'),
    "js": (r"\Z", f'\nconsole.log("{END}");'),
}
_SAY_END["ts"] = _SAY_END["js"]
_ASK = (
    "Complete this {language} code. Answer with all of it in one block of code.\n\n```\n{prompt}```"
)


class MultiplE(Task):
    """HumanEval translated to one language, the "reworded" prompts."""

    id_form = "{name}"
    protocol = "zero-shot"
    chat_protocol = "zero-shot, chat format with our own question"
    runs_programs = True

    def __init__(self, setting: Setting | None, language: str) -> None:
        super().__init__(setting)
        self.name = f"multipl-e-{language}"
        self.file = f"multipl-e/humaneval-{language}-reworded.jsonl.gz"
        self._language = language
        if language == "java":  # asks BigInteger.isProbablePrime(1), which draws its witness
            self.known_broken = frozenset({"HumanEval_39_prime_fib"})

    def prompt(self, problem: Problem) -> Prompt:
        """The header in the language, or a question that holds it."""
        text = problem.row["prompt"]
        if self.setting.chat:
            question = _ASK.format(language=find_language(self._language).name, prompt=text)
            return Prompt.question(question, max_tokens=1024)
        return Prompt(text, stop=tuple(problem.row["stop_tokens"]))

    def trim(self, problem: Problem, text: str) -> str:
        """Up to the first stop token of the language."""
        if self.setting.chat:
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
        tests = row["tests"]
        if self._language == "cs":  # Mono's Debug.Assert goes on; every one is a line of its own
            tests = _ASSERT.sub(r"if (!(\1)) throw null;", tests)
        tests = re.sub(*_SAY_END[self._language], tests, count=1)
        return run_program(program + tests + "\n", self._language, TIMEOUT_S, patience)

    def reference_problems(self) -> list[Problem]:
        """Those with a known solution: in the infilling file, for Java, JavaScript and Python."""
        return [p for p in self.problems() if self.reference(p) is not None]

    def reference(self, problem: Problem) -> str | None:
        """A model's correct solution, put together from the infilling file."""
        whole = self._solutions.get(problem.task_id, "")
        # The infilling prompts were translated at another time; some differ in a comment.
        header = problem.row["prompt"].rstrip().rpartition("\n")[2]
        if self._language == "py":
            header = f"def {problem.task_id.split('_', 2)[2]}("
            _, found, rest = whole.partition(header)
            return f"    pass\n{header}{rest}" if found else None
        _, found, rest = whole.partition(header)
        # The tests close what the solution leaves open.
        return cut(rest, problem.row["stop_tokens"]) if found else None

    @cached_property
    def _solutions(self) -> dict[str, str]:
        """The first whole program of each problem, where the infilling file has the language."""
        if self._language not in ("java", "js", "py"):
            return {}
        solutions: dict[str, str] = {}
        for row in self.other_rows(INFILLING_FILE):
            if row["language"] == self._language:
                name = row["name"].removeprefix("humaneval-").partition(".json")[0]
                solutions.setdefault(name, _whole(row, row["canonical_solution"]))
        return solutions

    def solution(self, problem: Problem, completion: str) -> str:
        """Header and body."""
        return problem.row["prompt"] + completion

    def unavailable(self) -> str:
        """The missing compiler, interpreter or library."""
        if self._language == "java" and not Path(JAVATUPLES).exists():
            return f"java needs {JAVATUPLES} (Debian: libjavatuples-java), which is not installed"
        return missing_toolchain(self._language)


class MultiplEInfilling(Task):
    """One missing line in Java, JavaScript and Python; exact match."""

    file = INFILLING_FILE
    id_form = "{language}/{name}"  # names occur once a language
    group_form = "{language}"
    reference_field = "canonical_solution"

    def __init__(self, setting: Setting | None, suffix_first: bool = False) -> None:
        super().__init__(setting)
        order = "SPM" if suffix_first else "PSM"
        self.name = f"multipl-e-infilling-{order.lower()}"
        self._suffix_first = suffix_first
        self.protocol = f"{order}, first line that is not empty, white space around it ignored"

    def prompt(self, problem: Problem) -> Prompt:
        """The gap."""
        gap = (problem.row["prompt"], problem.row["suffix"])
        return Prompt(gap=gap, suffix_first=self._suffix_first, max_tokens=96)

    def trim(self, problem: Problem, text: str) -> str:
        """The first line with something on it."""
        return text.strip().partition("\n")[0].rstrip()

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Compare with the line that was there."""
        line = problem.row["canonical_solution"]
        return graded({"exact_match": exact_match(completion, line)})


def _whole(row: dict[str, str], line: str) -> str:
    """The program around a gap; the file leaves out the line ends at its borders."""
    before = row["prompt"] + ("" if row["prompt"].endswith("\n") else "\n")
    after = row["suffix"] if row["suffix"].startswith("\n") else "\n" + row["suffix"]
    return before + line + after
