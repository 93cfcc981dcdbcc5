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

# A line that starts a top-level statement: not indented, not closing a bracket, not a comment that
# belongs to the statement below it.
_TOP_LEVEL = re.compile(r"^(?=(?:@|def |class |async def |if |for |try:|with |[A-Za-z_]))", re.M)


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

    A single statement that is longer stays whole. The parts joined are the document.
    """
    if max_chars is None or len(text) <= max_chars:
        return [text]
    starts = [match.start() for match in _TOP_LEVEL.finditer(text)]
    parts: list[str] = []
    begin = 0
    for start, following in zip(starts, [*starts[1:], len(text)], strict=True):
        if start > begin and following - begin > max_chars and not _is_decorated(text, start):
            parts.append(text[begin:start])
            begin = start
    parts.append(text[begin:])
    return parts


def _is_decorated(text: str, start: int) -> bool:
    """Whether the line before is a decorator, which belongs to the statement at `start`."""
    previous = text.rfind("\n", 0, max(start - 1, 0)) + 1
    return text.startswith("@", previous)
