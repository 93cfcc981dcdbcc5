"""Lines of a corpus's held-out documents: infilled (PSM, SPM) and completed left to right.

The packages of the validation split take turns. Drawn is a line, or the body of a short function,
out of a part of a document (at most 2,400 characters, cut at statements). The model writes it with
its indentation, greedily; as many lines as were removed must equal them, blank ones before them and
white space at both ends aside. Completing, left to right, it sees only what stands before.
"""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from codellama.data.corpus import corpus_documents
from codellama.data.fim import split_document
from codellama.engine import SamplingParams
from codellama.engine.engine import Engine

MIN_LINE_CHARS = 8  # shorter ones are brackets, else: and the like
MAX_PART_CHARS = 2400
MAX_LINE_TOKENS = 64
MAX_BODY_LINES = 3


@dataclass(frozen=True)
class Gap:
    """A line, or a few, that were taken out."""

    package: str
    prefix: str
    text: str  # stripped
    suffix: str


@dataclass(frozen=True)
class LineResult:
    """What a model wrote into gaps."""

    gaps: list[Gap]
    hits: dict[str, list[bool]]  # by way, for each gap
    ended_by_eot: dict[str, float]
    """Share of the infills that the model ended itself, by way."""
    nothing_else: dict[str, float]
    """Share of the infills that are the line and go no further, by way."""

    def exact_match(self) -> dict[str, float]:
        """Share of right lines by way."""
        return {way: round(sum(hits) / len(hits), 4) for way, hits in self.hits.items()}


def draw_gaps(
    corpus: str | Path, n_lines: int, engine: Engine, seed: int = 0, bodies: bool = False
) -> list[Gap]:
    """Draw lines, spread evenly over the packages; those of fewer documents come back sooner.

    Args:
        bodies: draw whole bodies of functions, without the docstring, of at most 3 lines.

    Raises:
        ValueError: the corpus has no held-out document with a line that can be drawn.
    """
    max_tokens = engine.max_context - MAX_LINE_TOKENS - 8  # room for the markers
    reader = corpus_documents(corpus, "validation")
    rng = random.Random(seed)
    by_package: dict[str, list[int]] = defaultdict(list)
    for index, package in enumerate(reader.column("repository")):
        by_package[package].append(index)
    gaps, n_tries = list[Gap](), 0
    while len(gaps) < n_lines:
        for package, indices in sorted(by_package.items()):
            n_tries += 1
            text = reader.text(rng.choice(indices))
            part = rng.choice(split_document(text, MAX_PART_CHARS, whole_definitions=True))
            ranges = _bodies(part) if bodies else _lines(part)
            if not ranges or len(engine.tokenizer.encode(part)) > max_tokens:
                continue
            begin, end = rng.choice(ranges)
            lines = part.splitlines(keepends=True)
            prefix, suffix = "".join(lines[:begin]), "\n" + "".join(lines[end:])
            gaps.append(Gap(package, prefix, "".join(lines[begin:end]).strip(), suffix))
        if n_tries >= 100 * (len(gaps) + 1) or not by_package:
            raise ValueError(f"{corpus}: too few held-out lines to draw from")
    return gaps[:n_lines]


def _lines(part: str) -> list[tuple[int, int]]:
    """Which single lines can be drawn, as (first, behind the last)."""
    lines = enumerate(part.splitlines(keepends=True))
    return [(n, n + 1) for n, line in lines if len(line.strip()) >= MIN_LINE_CHARS]


def _bodies(part: str) -> list[tuple[int, int]]:
    """Which bodies of functions can be drawn; none where the part does not parse alone."""
    try:
        nodes = list(ast.walk(ast.parse(part)))
    except (SyntaxError, ValueError, RecursionError):
        return []
    found: list[tuple[int, int]] = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            begin, end = (body[0].lineno - 1, body[-1].end_lineno or 0) if body else (0, 0)
            if node.lineno <= begin and 0 < end - begin <= MAX_BODY_LINES:
                found.append((begin, end))
    return found


def fill_lines(engine: Engine, gaps: list[Gap]) -> LineResult:
    """Write each gap in all three ways and compare."""
    params = SamplingParams(max_tokens=MAX_LINE_TOKENS)
    around = [(gap.prefix, gap.suffix) for gap in gaps]
    written = {
        "psm": engine.infill(around, params),
        "spm": engine.infill(around, params, suffix_first=True),
        "left_to_right": engine.complete([gap.prefix for gap in gaps], params),
    }
    hits = {
        way: [_starts_with(c.text, gap.text) for gap, c in zip(gaps, found, strict=True)]
        for way, found in written.items()
    }
    ended, alone = {}, {}
    for way in ("psm", "spm"):
        found = list(zip(gaps, written[way], strict=True))
        ended[way] = sum(c.finish_reason == "stop" for _, c in found) / len(gaps)
        alone[way] = sum(c.text.strip() == gap.text for gap, c in found) / len(gaps)
    return LineResult(gaps, hits, ended, alone)


def _starts_with(written: str, lines: str) -> bool:
    n_lines = lines.count("\n") + 1
    return "\n".join(written.lstrip().splitlines()[:n_lines]).rstrip() == lines
