"""The infilling transformation: a document becomes prefix, middle and suffix (paper 2.3).

The split is by characters and lives on text; ids are put together by tokenizer/infilling.py. What
is drawn depends only on (seed, epoch, document), so that every epoch has fresh splits and every
run the same ones. Which documents are eligible is decided by packing.py.
"""

from __future__ import annotations

import random
import re

from codellama.tokenizer import Tokenizer
from codellama.tokenizer.infilling import infilling_example

# Lines from which a top-level statement may start. `else` and the like continue the one before.
_TOP_LEVEL = re.compile(r"^(?!(?:elif|else|except|finally)\b)(?=[@#A-Za-z_])", re.M)


def split_three(text: str, rng: random.Random) -> tuple[str, str, str]:
    """Cut at two points drawn independently and uniformly over the characters.

    Returns:
        (prefix, middle, suffix); any of them may be empty.
    """
    first, second = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return text[:first], text[first:second], text[second:]


def transform(
    tokenizer: Tokenizer, text: str, rng: random.Random, fim_rate: float, spm_share: float
) -> list[int] | None:
    """The ids of a document transformed for infilling, or None when it is drawn to stay as it is.

    The draws come in a fixed order, so that a change of one rate does not move the cut points.
    """
    is_transformed = rng.random() < fim_rate
    suffix_first = rng.random() < spm_share
    if not is_transformed:
        return None
    prefix, middle, suffix = split_three(text, rng)
    return infilling_example(tokenizer, prefix, middle, suffix, suffix_first)


def split_document(text: str, max_chars: int | None) -> list[str]:
    """Cut a document at top-level statements into parts of at most `max_chars` where possible.

    A single statement that is longer stays whole; decorators and comments stay with the statement
    below them. The parts joined are the document.
    """
    if max_chars is None or len(text) <= max_chars:
        return [text]
    starts = _statement_starts(text)
    parts: list[str] = []
    begin = 0
    for i, start in enumerate(starts):
        following = starts[i + 1] if i + 1 < len(starts) else len(text)
        if start > begin and following - begin > max_chars:
            parts.append(text[begin:start])
            begin = start
    parts.append(text[begin:])
    return parts


def _statement_starts(text: str) -> list[int]:
    """Where top-level statements start, with what belongs to them above."""
    starts: list[int] = []
    belongs_below = False
    for match in _TOP_LEVEL.finditer(text):
        if not belongs_below:
            starts.append(match.start())
        belongs_below = text[match.start()] in "@#"
    return starts
