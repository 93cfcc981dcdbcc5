"""The infilling transformation: a document becomes prefix, middle and suffix (paper 2.3).

The split is by characters and lives on text; ids are put together by tokenizer/infilling.py. What
is drawn depends only on (seed, epoch, document), so that every epoch has fresh splits and every
run the same ones. Which documents are eligible is decided by packing.py.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise, takewhile

from codellama.tokenizer import Tokenizer
from codellama.tokenizer.infilling import infilling_example, infilling_ids

# A line from which a statement may start, at its indentation; `else` and the like continue the one
# before. Strings and comments are matched so that what stands inside them is passed over.
_STATEMENT_OR_STRING = re.compile(
    r"""^(?P<indent>\ *)(?=(?!(?:elif|else|except|finally)\b)[@\#A-Za-z_])
    | \#[^\n]*
    | (?P<quotes>\"{3}|'{3})(?:\\.|[^\\])*?(?P=quotes)
    | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
    """,
    re.M | re.S | re.X,
)
_DEFINITION = re.compile(r"(?:async +)?def\b|class\b|@")


def split_three(text: str, rng: random.Random) -> tuple[str, str, str]:
    """Cut at two points drawn independently and uniformly over the characters.

    Returns:
        (prefix, middle, suffix); any of them may be empty.
    """
    first, second = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return text[:first], text[first:second], text[second:]


def split_at_lines(text: str, rng: random.Random) -> tuple[str, str, str]:
    """Cut out what an editor asks for: a line from its start or from a point in it, and often more.

    Each further line is taken with probability 0.4. The suffix starts with a line's end.

    Returns:
        (prefix, middle, suffix); the middle is empty where the point drawn ends a line.
    """
    begin = end = rng.randint(0, len(text))
    if rng.random() < 0.5:
        begin = text.rfind("\n", 0, begin) + 1
    while True:
        end = text.find("\n", end)
        if end < 0:
            return text[:begin], text[begin:], ""
        if rng.random() >= 0.4:
            return text[:begin], text[begin:end], text[end:]
        end += 1


def transform(
    tokenizer: Tokenizer,
    text: str,
    rng: random.Random,
    fim_rate: float,
    spm_share: float,
    line_share: float = 0.0,
    middle_weight: float = 1.0,
) -> tuple[list[int], list[float] | None] | None:
    """A document transformed for infilling, or None when it is drawn to stay as it is.

    The draws come in a fixed order, so that a change of one rate does not move the cut points.

    Returns:
        Its ids, and how much of the loss each is; None for 1.
    """
    is_transformed = rng.random() < fim_rate
    suffix_first = rng.random() < spm_share
    if not is_transformed:
        return None
    prefix, middle, suffix = split_three(text, rng)
    if rng.random() < line_share:
        prefix, middle, suffix = split_at_lines(text, rng)
    ids = infilling_example(tokenizer, prefix, middle, suffix, suffix_first)
    if middle_weight == 1:
        return ids, None
    begin = ids.index(infilling_ids(tokenizer)[2]) + 1  # no text gives a second MID
    if suffix_first:  # one token may be of both, and is then the middle's
        pairs = zip(ids[begin:], tokenizer.encode(prefix), strict=False)
        begin += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ids, [1.0] * begin + [middle_weight] * (len(ids) - begin)


def split_document(text: str, max_chars: int | None, whole_definitions: bool = False) -> list[str]:
    """Cut a document at statements into parts of at most `max_chars`.

    At top-level statements first; what is then still too long, at the definitions inside it; a
    single definition, unless it is to stay whole, and a statement at lines. A longer line stays.
    Decorators and comments stay with the statement below them. The parts joined are the document.
    """
    if max_chars is None or len(text) <= max_chars:
        return [text]
    starts = _starts(text)
    top = _pieces(text, [at for at, indent in starts if indent == 0])
    parts: list[str] = []
    begin = 0
    for piece in top:
        if len(piece) > max_chars:
            inner = [at - begin for at, indent in starts if indent > 0]
            units = _pieces(piece, [at for at in inner if 0 < at < len(piece)])
        else:
            units = [piece]
        begin += len(piece)
        if not whole_definitions:
            units = [part for unit in units for part in _at_lines(unit, max_chars)]
        for unit in units:
            if parts and len(parts[-1]) + len(unit) <= max_chars:
                parts[-1] += unit
            else:
                parts.append(unit)
    return parts


def _pieces(text: str, starts: list[int]) -> list[str]:
    """The text cut at the given places."""
    edges = [0, *(at for at in starts if at > 0), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def _at_lines(text: str, max_chars: int) -> list[str]:
    """The text as it is where it is short enough, else its lines."""
    return [text] if len(text) <= max_chars else text.splitlines(keepends=True)


def _starts(text: str) -> list[tuple[int, int]]:
    """(place, indentation) where a part may start: a top-level statement or an inner definition.

    What belongs to it, decorators and comments, is above and starts it.
    """
    starts: list[tuple[int, int]] = []
    above: int | None = None  # where the decorators and comments of the next statement begin
    for match in _STATEMENT_OR_STRING.finditer(text):
        if match["indent"] is None:
            continue
        at, indent = match.start(), len(match["indent"])
        first = text[match.end()]
        begin = at if above is None else above
        above = begin if first in "@#" else None
        if above is None and (indent == 0 or _DEFINITION.match(text, match.end())):
            starts.append((begin, indent))
    return starts
