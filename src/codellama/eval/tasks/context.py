"""Long contexts and plain likelihood: key retrieval, perplexity by position, bits per byte.

Source: Code Llama paper, 3.3, figure 4 and appendix G.2. Its filler (CodeContests) and its files
of at least 50 kB are not public; ours are named in each protocol.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

from codellama.eval.task import USUAL, Patience, Problem, Prompt, Task, Verdict, graded, random_for

POSITIONS = (0.0, 0.2, 0.4)  # Code Llama paper, table 17
N_EXAMPLES = 64  # a length and position, as there
FILLER_FILE = "mbpp/mbpp.jsonl.gz"
LONG_FILE = "longbench-code/lcc-sample.jsonl.gz"
MAX_FILE_BYTES = 400_000  # of a long text
PIECE_CHARS = 1500  # fits a context of 1,024 tokens with any vocabulary of source code
_KEY = '''
def my_function() -> int:
    """Note that this function is used at the end"""
    return {value}

'''
_END = "\nassert my_function() == "


class KeyRetrieval(Task):
    """A number returned by a function far back in the prompt."""

    name = "key-retrieval"
    protocol = (
        "filler: MBPP solutions (the paper's is not public); 64 prompts a length and position"
    )
    n_examples = N_EXAMPLES

    def load(self) -> Iterable[Problem]:
        """One problem for each length, position and example."""
        rows = self.data_file(FILLER_FILE).rows()
        self._filler = [row["code"].replace("\r\n", "\n").strip() for row in rows]
        for length in self.setting.lengths:
            for position in POSITIONS:
                for number in range(self.n_examples):
                    row = {"length": length, "position": position, "number": number}
                    task_id = f"KeyRetrieval/{length}/{position}/{number}"
                    yield Problem(task_id, row, f"{length}@{position}")

    def prompt(self, problem: Problem) -> Prompt:
        """Filler to the length in tokens, the function at its place, the assert at the end.

        Raises:
            ValueError: there is no tokenizer to count with.
        """
        tokenizer = self.setting.tokenizer
        if tokenizer is None:
            raise ValueError(f"{self.name}: asking needs a model's tokenizer")
        programs = list(self._filler)
        random_for("filler", problem.task_id).shuffle(programs)
        key = _KEY.format(value=self.reference(problem))
        wanted = problem.row["length"] - len(tokenizer.encode(key + _END)) - 1
        chosen: list[str] = []
        n_tokens = 0
        while n_tokens < wanted:
            chosen.append(programs[len(chosen) % len(programs)])
            n_tokens += len(tokenizer.encode(chosen[-1] + "\n\n"))
        if n_tokens > wanted and len(chosen) > 1:
            chosen.pop()  # never longer than the length it is reported under
        place = round(problem.row["position"] * len(chosen))
        before, after = chosen[:place], chosen[place:]
        return Prompt("\n\n".join([*before, key, *after, _END.lstrip()]), max_tokens=4)

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """The number must come first."""
        found = re.match(r"\s*(\d+)", completion)
        is_right = found is not None and found[1] == self.reference(problem)
        return graded({"retrieved": float(is_right)}, "retrieved")

    def reference(self, problem: Problem) -> str:
        """Two digits, drawn for each problem."""
        return str(random_for("value", problem.task_id).randint(10, 99))


class PerplexityByPosition(Task):
    """How well a model predicts the tokens of long files, by how much it has read before."""

    name = "perplexity"
    protocol = "files of --data, or LCC's, each up to the model's context; loss in nats a token"

    def load(self) -> Iterable[Problem]:
        """The text files of a folder, or one file; without these the longest public ones."""
        data = self.setting.data
        if data is None or (data / "humaneval").is_dir():
            for row in self.data_file(LONG_FILE).rows():
                yield Problem(row["id"], {"text": row["context"]})
            return
        for file in sorted(data.rglob("*")) if data.is_dir() else [data]:
            if file.is_file() and not file.name.startswith("."):
                text = file.read_bytes()[:MAX_FILE_BYTES].decode("utf-8", "ignore")
                if text.strip():
                    name = str(file.relative_to(data)) if data.is_dir() else file.name
                    yield Problem(name, {"text": text})

    def prompt(self, problem: Problem) -> Prompt:
        """The text, as far as the context goes."""
        return Prompt(texts=(problem.row["text"],), may_lose_end=True)

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Mean loss of the tokens up to each power of two, from the one before."""
        losses = [-value for value in json.loads(completion)[0]]
        values, begin, end = {}, 0, 128
        while len(losses) >= end:
            values[f"loss@{end}"] = math.fsum(losses[begin:end]) / (end - begin)
            begin, end = end, end * 2
        return Verdict("passed", values)


class BitsPerByte(Task):
    """How many bits a model needs for a byte of text, whatever its vocabulary."""

    name = "bits-per-byte"
    protocol = f"texts of --data or HumanEval's programs, pieces of up to {PIECE_CHARS} characters"

    def load(self) -> Iterable[Problem]:
        """Pieces of texts, cut at lines."""
        data = self.setting.data
        if data is None or (data / "humaneval").is_dir():
            for row in self.data_file("humaneval/HumanEval.jsonl.gz").rows():
                yield from _pieces(row["task_id"], row["prompt"] + row["canonical_solution"])
        else:
            for problem in PerplexityByPosition(self.setting).load():
                yield from _pieces(problem.task_id, problem.row["text"])

    def prompt(self, problem: Problem) -> Prompt:
        """The piece."""
        return Prompt(texts=(problem.row["text"],))

    def check(self, problem: Problem, completion: str, patience: Patience = USUAL) -> Verdict:
        """Bits over bytes; a long piece weighs more."""
        n_bytes = len(problem.row["text"].encode())
        bits = -math.fsum(json.loads(completion)[0]) / math.log(2)
        return Verdict("passed", {"bits_per_byte": bits / n_bytes}, weight=n_bytes)


def _pieces(name: str, text: str) -> Iterable[Problem]:
    piece, number = "", 0
    lines = text.splitlines(keepends=True)
    parts = [
        line[at : at + PIECE_CHARS] for line in lines for at in range(0, len(line), PIECE_CHARS)
    ]
    for part in parts:
        if piece and len(piece) + len(part) > PIECE_CHARS:
            yield Problem(f"{name}#{number}", {"text": piece})
            piece, number = "", number + 1
        piece += part
    if piece.strip():
        yield Problem(f"{name}#{number}", {"text": piece})
