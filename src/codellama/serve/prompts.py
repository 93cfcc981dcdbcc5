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
_BEGINNING = re.compile(r"\s?(?:<s>)?\s?<PRE>")
_UNIT = re.compile(r"[^\n]{0,200}\n|[^\n]{1,200}")
_MAX_CHARS = 64  # of a token, generously
_MARGIN_TOKENS = 16  # control ids, and what units encoded alone may save
_FORMS = {  # of comments, by the endings of files
    "// {}": "c h cc cpp hpp cs java js mjs cjs jsx ts tsx go rs swift kt scala dart d zig cu glsl "
    "groovy less m proto scss sol sv typ v wgsl",
    "-- {}": "adb ads elm hs idr lean lua luau sql vhd vhdl",
    "; {}": "asm clj cljs el ll lisp nasm rkt scm",
    "% {}": "bib erl tex",
    "/* {} */": "css",
    "<!-- {} -->": "html ipynb md svelte svg vue xml xsl",
    "<?php // {} ?>": "php",
}
_COMMENTS = {f".{ending}": form for form, endings in _FORMS.items() for ending in endings.split()}


@dataclass(frozen=True)
class Prompt:
    """What the model continues, and where it ends by itself."""

    ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    suffix: str = ""
    """What stands behind the gap."""
    is_truncated: bool = False
    is_infilling: bool = False


def completion(tokenizer: Tokenizer, text: str | Sequence[int], recognise: bool = True) -> Prompt:
    """A text to continue, ids as they are if all are known, or an infilling in its written form."""
    if isinstance(text, str):
        if recognise and tokenizer.supports_infilling and (gap := written_gap(text)):
            prefix, suffix, middle, suffix_first = gap
            ids = tokenizer.encode_infilling(prefix, suffix, suffix_first)
            ids += tokenizer.encode_without_prefix_space(middle)
            return _gap(tokenizer, ids, suffix)
        return Prompt(tuple(tokenizer.encode(text, bos=True)), (tokenizer.eos_id,))
    if not text:
        raise ValueError("prompt is an empty list: expected at least one token id")
    if wrong := next((i for i in text if not 0 <= i < tokenizer.vocab_size), None):
        raise ValueError(f"prompt holds id {wrong}: expected ids in [0, {tokenizer.vocab_size})")
    is_gap = tokenizer.supports_infilling and tokenizer.middle_id in text
    stops = gaps.stop_ids(tokenizer) if is_gap else (tokenizer.eos_id,)
    return Prompt(tuple(text), stops, is_infilling=is_gap)


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
    """
    ids = tokenizer.encode_infilling(_headed(files) + prefix, suffix, suffix_first)
    surplus = 0 if room is None else len(ids) - room
    if room is None or surplus <= 0:
        return _gap(tokenizer, ids, suffix)
    n_dropped = 0
    while n_dropped < len(files) and surplus > 0:
        dropped = _headed(files[n_dropped : n_dropped + 1])
        surplus -= len(tokenizer.encode_without_prefix_space(dropped))
        n_dropped += 1
    if surplus > 0:
        prefix, suffix = _fitted(tokenizer, prefix, suffix, room - _MARGIN_TOKENS)
    before = _headed(files[n_dropped:]) + prefix
    ids = tokenizer.encode_infilling(before, suffix, suffix_first)
    return _gap(tokenizer, ids, suffix, is_cut=True)


def dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> Prompt:
    """The assistant's next message; refused as `encode_dialog` refuses it."""
    return Prompt(tuple(tokenizer.encode_dialog(messages)), dialogs.stop_ids(tokenizer))


def written_gap(text: str) -> tuple[str, str, str, bool] | None:
    """(prefix, suffix, beginning of the middle, suffix first) of an infilling in written form."""
    if (begin := _BEGINNING.match(text)) is None:
        return None
    before, _, middle = text[begin.end() :].rpartition("<MID>")
    prefix, marker, suffix = before.rpartition("<SUF>")
    if not marker:
        return None
    suffix_first = not prefix.strip(" ") and bool(middle.strip())
    is_spaced = prefix.endswith(" ") and suffix.endswith(" ")
    if is_spaced:
        prefix, suffix = prefix[:-1].removeprefix(" "), suffix[:-1]
    if suffix.startswith((" \n", " \r\n")) or suffix == " ":
        suffix = suffix[1:]
    if suffix_first:
        return middle.removeprefix(" ") if is_spaced else middle, suffix, "", True
    return prefix, suffix, middle if middle.strip() else "", False


def _gap(tokenizer: Tokenizer, ids: Sequence[int], suffix: str, is_cut: bool = False) -> Prompt:
    return Prompt(tuple(ids), gaps.stop_ids(tokenizer), suffix, is_cut, is_infilling=True)


def _headed(files: Iterable[tuple[str, str]]) -> str:
    """Files as the corpus of repositories has them, each below a comment with its path."""
    return "".join(f"{_comment(path)}\n{text}\n\n" for path, text in files)


def _comment(path: str) -> str:
    path = path.replace("\n", " ")
    return _COMMENTS.get(PurePosixPath(path).suffix.lower(), "# {}").format(path)


def _fitted(tokenizer: Tokenizer, prefix: str, suffix: str, room: int) -> tuple[str, str]:
    """The texts without the lines farthest from the gap; three quarters belong to the prefix."""
    # First roughly: what can never fit is not worth encoding line by line.
    n_chars = room * _MAX_CHARS
    prefix, suffix = prefix[_stepped(len(prefix) - n_chars, n_chars // 2) :], suffix[:n_chars]
    before, after = _UNIT.findall(prefix), _UNIT.findall(suffix)
    n_before = [len(tokenizer.encode_without_prefix_space(unit)) for unit in before]
    n_after = [len(tokenizer.encode_without_prefix_space(unit)) for unit in after]
    room_before = max(room * 3 // 4, room - sum(n_after))
    surplus = _stepped(sum(n_before) - room_before, room_before // 4)
    start, end = 0, len(after)
    while start < len(before) and surplus > 0:
        surplus -= n_before[start]
        start += 1
    surplus = sum(n_before[start:]) + sum(n_after) - room
    while end and surplus > 0:
        end -= 1
        surplus -= n_after[end]
    return "".join(before[start:]), "".join(after[:end])


def _stepped(surplus: int, step: int) -> int:
    """At least the surplus, in whole steps: the next keystroke then has the same beginning."""
    return max(0, -(-surplus // max(1, step)) * max(1, step))
