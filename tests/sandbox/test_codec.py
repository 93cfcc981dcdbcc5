"""Values go across unchanged, and hostile bytes become an error and nothing else."""

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama.sandbox import codec


def refuse(*_):
    raise codec.CodecError("an object")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(
        allow_nan=False) | st.text() | st.binary() | st.dates() | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner)
    | st.sets(st.integers()) | st.frozensets(st.text()) | st.lists(st.integers()),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
@settings(max_examples=150, deadline=None)
def test_round_trip(value):
    again = codec.decode(codec.encode(value, refuse), refuse)
    assert again == value
    assert type(again) is type(value)
    assert repr(again) == repr(value) or isinstance(value, set | frozenset | dict | list | tuple)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes(data):
    with contextlib.suppress(codec.CodecError):
        codec.decode(data, refuse)


def test_damaged_values():
    rng = random.Random(0)
    whole = codec.encode([{"a": [1, 2.5, (None, True)]}, {1, 2}, b"x", range(3), [1] * 50], refuse)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            value = codec.decode(bytes(data[: rng.randint(1, len(data))]), refuse)
        except codec.CodecError:
            continue
        assert type(value).__module__ in ("builtins", "collections")


def test_bounds():
    deep = []
    for _ in range(codec.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(codec.CodecError, match="deeper"):
        codec.encode(deep, refuse)
    with pytest.raises(codec.CodecError, match="at most"):
        codec.encode("x" * (codec.MAX_BYTES + 1), refuse)
    with pytest.raises(codec.CodecError, match="early"):
        codec.decode(b"l\xff\xff\xff\x7f", refuse)  # a list of two milliards, in five bytes
    with pytest.raises(codec.CodecError, match="deeper"):
        codec.decode(b"l\x01\0\0\0" * 1000 + b"N", refuse)


def test_subclasses_are_asked_nothing():
    class Liar(int):
        def __index__(self):
            return 1

        __int__ = __eq__ = __hash__ = __repr__ = lambda *_: 1

    class Sly(list):
        def __iter__(self):
            return iter([1])

        def __len__(self):
            return 1

    value = codec.decode(codec.encode([Liar(7), Sly([5, 6])], refuse), refuse)
    assert value == [7, [5, 6]]
    assert [type(each) for each in value] == [int, list]
