"""Single lines: completion behind a long context (LCC, RepoBench-P), and docstrings in one line.

Source: Code Llama paper, 3.3, table 7 and appendix G.2 (lines); table 13 and appendix E
(docstrings); LongBench's scoring of the two line sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from codellama.eval.metrics import edit_similarity, exact_match, smoothed_bleu
from codellama.eval.task import USUAL, Patience, Problem, Prompt, Task, Verdict, graded

LINE_FILES = {
    "lcc": "longbench-code/lcc-sample.jsonl.gz",
    "repobench-p": "longbench-code/repobench-p-sample.jsonl.gz",
}
DOCSTRING_FILE = "codexglue/cosqa-dev.jsonl.gz"
_DOCSTRING = re.compile(r'("""|\'\'\').*?\1', re.DOTALL)


class LineCompletion(Task):
    """The line that follows a long piece of code."""

    def __init__(self, name: str, data: Path | None = None) -> None:
        super().__init__()
        self.name = name
        self.file = LINE_FILES[name]
        self._data = data
        self.protocol = "the code alone, its beginning dropped where it exceeds the context"

    def load(self) -> Iterable[Problem]:
        """Read the problems."""
        found = self.data_file(self.file, self._data)
        for row in found.rows():
            yield Problem(row["id"], row)

    def prompt(self, problem: Problem) -> Prompt:
        """The code, up to the line."""
        text = problem.row["context"]
        return Prompt(text, may_lose_start=True, max_tokens=96)

    def trim(self, problem: Problem, text: str) -> str:
        """The first line that is neither empty, a comment nor a code fence."""
        for line in text.split("\n"):
            if line.strip() and not line.strip().startswith(("```", "#", "//")):
                return line.rstrip()
        return ""

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Compare with the line that was there, white space around it ignored."""
        got, wanted = completion.strip(), self.reference(problem).strip()
        return graded(
            {
                "exact_match": exact_match(got, wanted),
                "edit_similarity": edit_similarity(got, wanted),
                "bleu": smoothed_bleu(got, wanted),
            }
        )

    def reference(self, problem: Problem) -> str:
        """The line that was there."""
        return problem.row["answers"][0]


class Docstrings(Task):
    """A one-line docstring for a Python function, as a gap between header and body."""

    name = "docstrings"

    def __init__(self, data: Path | None = None) -> None:
        super().__init__()
        self._data = data
        self.protocol = (
            "PSM; CoSQA's functions stand in for the CodeXGLUE code-to-text set, which has others"
        )

    def load(self) -> Iterable[Problem]:
        """Read the functions."""
        found = self.data_file(DOCSTRING_FILE, self._data)
        for row in found.rows():
            yield Problem(row["idx"], row)

    def prompt(self, problem: Problem) -> Prompt:
        """The function without its docstring.

        Three quotes and a space before the gap, and no closing quotes: scores depend on it.

        Raises:
            ValueError: the function has no docstring.
        """
        code = problem.row["code"]
        found = _DOCSTRING.search(code)
        if found is None:
            raise ValueError(f"{problem.task_id}: no docstring in {code[:60]!r}")
        prefix, suffix = code[: found.start()] + found[1] + " ", code[found.end() :]
        return Prompt(gap=(prefix, suffix), max_tokens=96)

    def trim(self, problem: Problem, text: str) -> str:
        """The first line with something on it, without the quotes that close it."""
        line = next((line for line in text.split("\n") if line.strip()), "")
        return line.partition('"""')[0].partition("'''")[0].strip()

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Compare with the cleaned docstring."""
        bleu = smoothed_bleu(completion, self.reference(problem))
        return graded({"bleu": bleu}, "bleu")

    def reference(self, problem: Problem) -> str:
        """The cleaned docstring."""
        return problem.row["docstring_tokens"]
