"""Single lines of a corpus's held-out documents: infilled (PSM, SPM) and completed left to right.

The packages of the validation split take turns. A line is drawn out of a part of a document (at
most 2,400 characters, cut at statements). The model writes the line with its indentation, greedily;
its first line must equal the removed one, both stripped of white space. Completing, left to right,
it sees only what stands before the line.
"""

from __future__ import annotations

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
WAYS = ("psm", "spm", "left_to_right")


@dataclass(frozen=True)
class Gap:
    """A line that was taken out."""

    package: str
    prefix: str
    line: str  # stripped
    suffix: str


@dataclass(frozen=True)
class LineResult:
    """What a model wrote into gaps."""

    gaps: list[Gap]
    hits: dict[str, list[bool]]
    """By way, for each gap."""
    ended_by_eot: dict[str, float]
    """Share of the infills that the model ended itself, by way."""

    def exact_match(self) -> dict[str, float]:
        """Share of right lines by way."""
        return {way: round(sum(hits) / len(hits), 4) for way, hits in self.hits.items()}


def draw_gaps(corpus: str | Path, n_lines: int, engine: Engine, seed: int = 0) -> list[Gap]:
    """Draw lines, spread evenly over the packages; those of fewer documents come back sooner.

    Raises:
        ValueError: the corpus has no held-out document with a line that can be drawn.
    """
    max_tokens = engine.max_context - MAX_LINE_TOKENS - 8  # room for the markers
    reader = corpus_documents(corpus, "validation")
    rng = random.Random(seed)
    by_package: dict[str, list[int]] = defaultdict(list)
    for index, package in enumerate(reader.column("repository")):
        by_package[package].append(index)
    gaps: list[Gap] = []
    n_tries = 0
    while len(gaps) < n_lines:
        for package, indices in sorted(by_package.items()):
            n_tries += 1
            text = reader.text(rng.choice(indices))
            part = rng.choice(split_document(text, MAX_PART_CHARS, whole_definitions=True))
            lines = part.splitlines(keepends=True)
            fitting = [n for n, line in enumerate(lines) if len(line.strip()) >= MIN_LINE_CHARS]
            if not fitting or len(engine.tokenizer.encode(part)) > max_tokens:
                continue
            n = rng.choice(fitting)
            prefix, suffix = "".join(lines[:n]), "\n" + "".join(lines[n + 1 :])
            gaps.append(Gap(package, prefix, lines[n].strip(), suffix))
        if n_tries >= 100 * (len(gaps) + 1) or not by_package:
            raise ValueError(f"{corpus}: too few held-out lines to draw from")
    return gaps[:n_lines]


def fill_lines(engine: Engine, gaps: list[Gap]) -> LineResult:
    """Write each line in all three ways and compare."""
    params = SamplingParams(max_tokens=MAX_LINE_TOKENS)
    around = [(gap.prefix, gap.suffix) for gap in gaps]
    to_the_end = SamplingParams(max_tokens=MAX_LINE_TOKENS, stop=("\n",))
    written = {
        "psm": engine.infill(around, params),
        "spm": engine.infill(around, params, suffix_first=True),
        "left_to_right": engine.complete([gap.prefix for gap in gaps], to_the_end),
    }
    hits = {
        way: [
            (c.text.lstrip().splitlines() or [""])[0].strip() == gap.line
            for gap, c in zip(gaps, completions, strict=True)
        ]
        for way, completions in written.items()
    }
    ended = {
        way: sum(c.finish_reason == "stop" for c in written[way]) / len(gaps)
        for way in ("psm", "spm")
    }
    return LineResult(gaps, hits, ended)
