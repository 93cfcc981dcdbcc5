"""Prompts and the ends of texts, against what they stand for."""

import asyncio
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama.engine import Piece
from codellama.serve import prompts
from codellama.serve.generation import Edit, edited, repeated

TEXTS = st.text(st.sampled_from("ab( )\n\t<>é"), max_size=12)
CODE = st.text(st.sampled_from("ab \n"), max_size=14)


@given(TEXTS, TEXTS.filter(lambda text: not text.startswith((" \n", " \r\n")) and text != " "))
@settings(deadline=None)
def test_the_written_form_is_the_form(prefix, suffix):
    """With the spaces of the paper and without; any text comes out as it went in."""
    assert prompts.written_gap(f"<PRE> {prefix} <SUF>{suffix} <MID>") == (prefix, suffix, "", False)


@pytest.mark.parametrize(
    ("text", "gap"),
    [
        ("<PRE>x = <SUF>\ny<MID>", ("x = ", "\ny", "", False)),
        ("<s><PRE> x = <SUF>\ny <MID>", ("x =", "\ny", "", False)),
        ("<PRE># a.py \n# x\nx = 1 <SUF> \ny <MID>", ("# a.py \n# x\nx = 1", "\ny", "", False)),
        ("<PRE> a\r\n <SUF>\r\nb <MID>", ("a\r\n", "\r\nb", "", False)),
        ("<PRE> x <SUF>y <MID> be", ("x", "y", " be", False)),
        ("<PRE> <SUF>y <MID> x", ("x", "y", "", True)),
        ("<PRE> a <SUF>b <SUF>c <MID>d <MID>", ("a <SUF>b", "c <MID>d", "", False)),
        ("see <PRE> x <SUF>y <MID>", None),
        ("<PRE> x <MID>y <SUF>", None),
        ("<PRE> x <MID>", None),
        ("<PRE>", None),
    ],
)
def test_the_spacings_of_clients(text, gap):
    assert prompts.written_gap(text) == gap


@given(st.lists(st.sampled_from(["<s>", "<PRE>", "<SUF>", "<MID>", " ", "\n", "x"]), max_size=9))
@settings(deadline=None)
def test_what_is_a_written_form(parts):
    """A gap lies between the last markers; each of the two texts may hold markers, too."""
    text = "".join(parts)
    form = re.compile(r"\s?(?:<s>)?\s?<PRE>(.*)<SUF>(.*)<MID>(.*)", re.DOTALL).fullmatch(text)
    gap = prompts.written_gap(text)
    assert (gap is None) == (form is None)
    if form and not form[3].strip():
        assert (gap[0].strip(), gap[1].strip()) == (form[1].strip(), form[2].strip())


@pytest.mark.parametrize("text", ["<SUF>" * 800_000, "<MID>" * 800_000, "<SUF><MID>" * 400_000])
def test_markers_without_a_form_take_no_time(text):
    """As much as a body may have; the search runs in the event loop, where others wait for it."""
    begin = time.process_time()
    prompts.written_gap("<PRE>" + text)
    assert time.process_time() - begin < 0.2


def test_written_and_given_have_the_same_ids(engine):
    prefix, suffix = "def f(x):\r\n    ", "\r\n    return y  \n"
    expected = engine.tokenizer.encode_infilling(prefix, suffix)
    for text in (f"<PRE> {prefix} <SUF>{suffix} <MID>", f"<PRE>{prefix}<SUF>{suffix}<MID>"):
        prompt = prompts.completion(engine.tokenizer, text)
        assert list(prompt.ids) == expected
        assert prompt.stop_ids == (engine.tokenizer.eos_id, engine.tokenizer.eot_id)
    plain = prompts.completion(engine.tokenizer, text, recognise=False)
    assert list(plain.ids) == engine.tokenizer.encode(text, bos=True)


@given(CODE, CODE)
@settings(deadline=None)
def test_repeated_is_the_longest_overlap(text, suffix):
    head = "".join(suffix.split())
    start, n = repeated(text, head)
    squeezed = "".join(text.split())
    overlaps = [k for k in range(len(head) + 1) if squeezed.endswith(head[:k])]
    assert n == max(overlaps)
    assert "".join(text[start:].split()) == head[:n]
    assert start == len(text) or not text[start].isspace()


def run(pieces, edit, suffix=""):
    """The pieces of an edited text and why it ended."""

    async def source():
        for number, text in enumerate(pieces):
            reason = "length" if number == len(pieces) - 1 else None
            yield Piece(text, (number,), (), (), reason, 0)

    async def collect():
        return [piece async for piece in edited(source(), edit, suffix)]

    found = asyncio.run(collect())
    assert [piece.finish_reason for piece in found[:-1]] == [None] * (len(found) - 1)
    return "".join(piece.text for piece in found), found[-1].finish_reason


@given(st.lists(CODE, min_size=1, max_size=5), CODE)
@settings(deadline=None)
def test_trimming_does_not_depend_on_the_pieces(pieces, suffix):
    text, head = "".join(pieces), "".join(suffix.split())
    start, n = repeated(text, head)
    trimmed = text[:start] if n >= 4 else text
    assert run(pieces, Edit(trim_suffix=True), suffix) == (trimmed, "length")


@given(st.lists(CODE, min_size=1, max_size=5))
@settings(deadline=None)
def test_whole_lines(pieces):
    text = "".join(pieces)
    expected = text[: text.rfind("\n") + 1] or text
    assert run(pieces, Edit(whole_lines=True))[0] == expected


@given(st.text(st.sampled_from("ab \t\n"), max_size=20), st.integers(1, 3))
@settings(deadline=None)
def test_outdented(text, min_indent):
    """A text ends before the first further line with less indent; blank lines have none."""
    expected = lines = text.splitlines(keepends=True)
    for number, line in list(enumerate(lines))[1:]:
        if line.strip() and len(line) - len(line.lstrip()) < min_indent:
            expected = lines[:number]
            break
    reason = "length" if expected == lines else "stop"
    assert run([text], Edit(min_indent=min_indent)) == ("".join(expected), reason)


def test_the_other_ends():
    text = ["if x:\n", "    y\n\n", "    z\n  ", "w\n"]
    assert run(text, Edit(min_indent=4)) == ("if x:\n    y\n\n    z\n  ", "stop")
    assert run(["a", "b\n", "c", "d"], Edit(time_limit_s=0)) == ("ab\n", "length")
    assert run(["a", "b"], Edit(time_limit_s=0)) == ("ab", "length")
