"""Prompts: the only place where the server turns what a client sent into ids.

Texts are encoded as texts: nothing in them can become a control id. The one exception is asked for
by the client: a prompt that is as a whole in the written form of infilling,
`<PRE> {prefix} <SUF>{suffix} <MID>`, stands for the ids of that form, as editors mean it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from codellama.tokenizer import Tokenizer
from codellama.tokenizer import chat as dialogs
from codellama.tokenizer import infilling as gaps
from codellama.tokenizer.chat import Message

# The space before a marker belongs to it; so does the one behind <PRE>. Behind <SUF> a space is
# text, except before a line's end, where a client that writes one there would otherwise leave it.
_WRITTEN = re.compile(r"\s?(?:<s>)?\s?<PRE>(.*)<SUF>(.*)<MID>(.*)", re.DOTALL)
_UNIT = re.compile(r"[^\n]{0,200}\n|[^\n]{1,200}")
_MARGIN_TOKENS = 16  # control ids, and what units encoded alone may save
_SLASHES = re.compile(
    r"\.(c|h|cc|cpp|hpp|cs|java|[cm]?js|jsx|tsx?|go|rs|swift|kt|scala|php|dart|d|zig|cu|groovy|m"
    r"|sol|proto)"
)
_MARKUP = re.compile(r"\.(md|html|xml|vue)")


@dataclass(frozen=True)
class Prompt:
    """What the model continues, and where it ends by itself."""

    ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    suffix: str = ""
    """What stands behind the gap."""
    is_truncated: bool = False


def completion(tokenizer: Tokenizer, text: str | Sequence[int], recognise: bool = True) -> Prompt:
    """A text to continue, ids as they are, or an infilling in its written form.

    Raises:
        ValueError: nothing to continue, or an id outside the vocabulary.
    """
    if isinstance(text, str):
        if recognise and tokenizer.supports_infilling and (gap := written_gap(text)):
            return _written(tokenizer, *gap)
        return Prompt(tuple(tokenizer.encode(text, bos=True)), (tokenizer.eos_id,))
    if not text:
        raise ValueError("prompt is an empty list: expected at least one token id")
    if wrong := next((i for i in text if not 0 <= i < tokenizer.vocab_size), None):
        raise ValueError(f"prompt holds id {wrong}: expected ids in [0, {tokenizer.vocab_size})")
    is_gap = tokenizer.supports_infilling and tokenizer.middle_id in text
    stops = gaps.stop_ids(tokenizer) if is_gap else (tokenizer.eos_id,)
    return Prompt(tuple(text), stops)


def infilling(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    suffix_first: bool = False,
    files: Sequence[tuple[str, str]] = (),
    room: int | None = None,
) -> Prompt:
    """The gap between two texts.

    Args:
        files: (path, text) of other files, put before the prefix as training put them.
        room: tokens that the prompt may have; files go first, the oldest before the others, then
            lines far from the gap. None leaves the prompt as it is.

    Raises:
        ValueError: the model cannot infill.
    """
    ids = tokenizer.encode_infilling(_headed(files) + prefix, suffix, suffix_first)
    is_truncated = room is not None and len(ids) > room
    if room is not None and is_truncated and files:
        shorter = infilling(tokenizer, prefix, suffix, suffix_first, files[1:], room)
        ids, suffix = list(shorter.ids), shorter.suffix
    elif room is not None and is_truncated:
        prefix, suffix = _fitted(tokenizer, prefix, suffix, room - _MARGIN_TOKENS)
        ids = tokenizer.encode_infilling(prefix, suffix, suffix_first)
    return Prompt(tuple(ids), gaps.stop_ids(tokenizer), suffix, is_truncated)


def dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> Prompt:
    """The assistant's next message.

    Raises:
        ValueError: as `encode_dialog`.
    """
    return Prompt(tuple(tokenizer.encode_dialog(messages)), dialogs.stop_ids(tokenizer))


def written_gap(text: str) -> tuple[str, str, str, bool] | None:
    """(prefix, suffix, beginning of the middle, suffix first) of an infilling in written form."""
    match = _WRITTEN.fullmatch(text)
    if match is None:
        return None
    prefix, suffix, middle = match.groups()
    suffix_first = not prefix.strip(" ") and bool(middle.strip())
    is_spaced = prefix.endswith(" ") and suffix.endswith(" ")
    if is_spaced:
        prefix, suffix = prefix[:-1].removeprefix(" "), suffix[:-1]
    if suffix.startswith((" \n", " \r\n")) or suffix == " ":
        suffix = suffix[1:]
    if suffix_first:
        return middle.removeprefix(" ") if is_spaced else middle, suffix, "", True
    return prefix, suffix, middle if middle.strip() else "", False


def _written(
    tokenizer: Tokenizer, prefix: str, suffix: str, middle: str, suffix_first: bool
) -> Prompt:
    ids = tokenizer.encode_infilling(prefix, suffix, suffix_first)
    ids += tokenizer.encode_without_prefix_space(middle)
    return Prompt(tuple(ids), gaps.stop_ids(tokenizer), suffix)


def _headed(files: Iterable[tuple[str, str]]) -> str:
    """Files as the corpus of repositories has them, each below a comment with its path."""
    return "".join(f"{_comment(path)}\n{text}\n\n" for path, text in files)


def _comment(path: str) -> str:
    path = path.replace("\n", " ")
    ending = PurePosixPath(path).suffix.lower()
    if _MARKUP.fullmatch(ending):
        return f"<!-- {path} -->"
    return f"// {path}" if _SLASHES.fullmatch(ending) else f"# {path}"


def _fitted(tokenizer: Tokenizer, prefix: str, suffix: str, room: int) -> tuple[str, str]:
    """The texts without the lines farthest from the gap; three quarters belong to the prefix."""
    before, after = _UNIT.findall(prefix), _UNIT.findall(suffix)
    n_before = [len(tokenizer.encode_without_prefix_space(unit)) for unit in before]
    n_after = [len(tokenizer.encode_without_prefix_space(unit)) for unit in after]
    room_before = max(room * 3 // 4, room - sum(n_after))
    # In steps, so that the next keystroke has the same beginning and finds it in the cache.
    surplus = sum(n_before) - room_before
    step = max(1, room_before // 4)
    surplus = -(-surplus // step) * step
    while before and surplus > 0:
        surplus -= n_before.pop(0)
        before.pop(0)
    while after and sum(n_before) + sum(n_after) > room:
        n_after.pop()
        after.pop()
    return "".join(before), "".join(after)
