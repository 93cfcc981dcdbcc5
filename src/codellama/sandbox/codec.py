"""Values between candidate and judge: plain data only, never pickle, never code.

Encoding takes exactly the base types, subclasses of them as their base (read by the base class's
own methods, so that an object cannot lie about what it holds). Everything else is a reference: a
number that stands for an object of the other side. Decoding trusts nothing: what it returns is
built here, of exact base types, and depth, items and bytes are bounded.
"""

from __future__ import annotations

import datetime
import struct
from array import array
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DEPTH = 100
MAX_ITEMS = 2_000_000
MAX_BYTES = 32 << 20

_U32, _DOUBLE, _COMPLEX, _REFERENCE = (struct.Struct(s) for s in ("<I", "<d", "<dd", "<cQ"))
_CONSTANTS: dict[bytes, Any] = {
    b"N": None, b"T": True, b"F": False, b".": Ellipsis, b"n": NotImplemented,
}  # fmt: skip
_TAG_OF_CONSTANT = {id(value): tag for tag, value in _CONSTANTS.items()}
_SEQUENCES: dict[bytes, type] = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset, b"q": deque}
_TAG_OF_SEQUENCE = {kind: tag for tag, kind in _SEQUENCES.items()}
_PACKED = {int: b"q", float: b"d"}  # array codes for lists of one type

# Types that are known by the arguments that make them again.
_REMADE: dict[str, tuple[type, Callable[[Any], tuple[Any, ...]]]] = {
    "range": (range, lambda v: (v.start, v.stop, v.step)),
    "Decimal": (Decimal, lambda v: (str(v),)),
    "Fraction": (Fraction, lambda v: (v.numerator, v.denominator)),
    "timedelta": (datetime.timedelta, lambda v: (v.days, v.seconds, v.microseconds)),
    "date": (datetime.date, lambda v: (v.year, v.month, v.day)),
    "time": (datetime.time, lambda v: (v.hour, v.minute, v.second, v.microsecond)),
    "datetime": (
        datetime.datetime,
        lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond),
    ),
}
_NAME_OF_REMADE = {kind: name for name, (kind, _) in _REMADE.items()}
_PLAIN = (int, float, str, bytes, bool, complex, list, tuple, dict, set, frozenset, type(None))
_TYPES = {kind.__name__: kind for kind in _PLAIN}
_BASES = (bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset, complex)


class CodecError(ValueError):
    """A value that does not go across, or bytes that are no value."""


def encode(value: Any, refer: Callable[[Any], tuple[bytes, int]]) -> bytes:
    """The bytes of a value; `refer` gives side (`m` mine, `y` yours) and number of an object.

    Raises:
        CodecError: too deep or too large.
    """
    out: list[bytes] = []
    _encode(value, out, MAX_DEPTH, refer)
    data = b"".join(out)
    if len(data) > MAX_BYTES:
        raise CodecError(f"a value of {len(data)} bytes; at most {MAX_BYTES} go across")
    return data


def _encode(value: Any, out: list[bytes], depth: int, refer: Any) -> None:
    kind = type(value)
    if id(value) in _TAG_OF_CONSTANT:
        out.append(_TAG_OF_CONSTANT[id(value)])
    elif kind is int:
        data = int.to_bytes(value, int.bit_length(value) // 8 + 1, "little", signed=True)
        out += (b"i", _U32.pack(len(data)), data)
    elif kind is float:
        out += (b"f", _DOUBLE.pack(value))
    elif kind is str:
        data = str.encode(value, "utf-8", "surrogatepass")
        out += (b"s", _U32.pack(len(data)), data)
    elif kind is bytes or kind is bytearray:
        out += (b"b" if kind is bytes else b"a", _U32.pack(len(value)), bytes(value))
    elif kind is complex:
        out += (b"c", _COMPLEX.pack(value.real, value.imag))
    elif depth == 0 or len(out) > MAX_ITEMS * 3:
        raise CodecError(f"a value deeper than {MAX_DEPTH} or of more than {MAX_ITEMS} items")
    elif kind is list and _encode_packed(value, out):
        pass
    elif kind in _TAG_OF_SEQUENCE:
        out += (_TAG_OF_SEQUENCE[kind], _U32.pack(len(value)))
        for item in value:
            _encode(item, out, depth - 1, refer)
    elif kind is dict:
        out += (b"D", _U32.pack(len(value)))
        for key, item in value.items():
            _encode(key, out, depth - 1, refer)
            _encode(item, out, depth - 1, refer)
    elif kind in _NAME_OF_REMADE and getattr(value, "tzinfo", None) is None:
        name = _NAME_OF_REMADE[kind]
        out.append(b"x")
        _encode((name, *_REMADE[name][1](value)), out, depth - 1, refer)
    elif kind is type and value.__name__ in _TYPES and _TYPES[value.__name__] is value:
        out.append(b"X")
        _encode(value.__name__, out, depth - 1, refer)
    elif base := next((each for each in _BASES if issubclass(kind, each)), None):
        _encode(_as_base(base, value), out, depth, refer)
    else:
        out.append(_REFERENCE.pack(*refer(value)))


def _as_base(base: type, value: Any) -> Any:
    """The plain value inside an instance of a subclass; its own methods are not asked."""
    if base is dict:
        return dict(dict.items(value))
    if base in (list, tuple, set, frozenset):
        return base(base.__iter__(value))
    plain = {int: int.__index__, float: float.__float__, complex: complex.__pos__, str: str.__str__}
    return plain[base](value) if base in plain else base(memoryview(value))


def _encode_packed(value: list[Any], out: list[bytes]) -> bool:
    """Lists of machine integers or of floats in one piece: they are what tests send most."""
    kinds = set(map(type, value))
    code = _PACKED.get(kinds.pop()) if len(kinds) == 1 else None
    if code is None:
        return False
    try:
        data = array(code.decode(), value).tobytes()
    except OverflowError:
        return False
    out += (b"p", code, _U32.pack(len(data)), data)
    return True


def decode(data: bytes, resolve: Callable[[bytes, int], Any]) -> Any:
    """The value in bytes; `resolve` gives the object for a reference.

    Raises:
        CodecError: not the bytes of one value, or one beyond the bounds.
    """
    reader = _Reader(data, resolve)
    try:
        value = reader.value(MAX_DEPTH)
    except CodecError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever hostile bytes lead to is the same mistake
        raise CodecError(f"not a value: {type(error).__name__}: {error}") from None
    if reader.at != len(data):
        raise CodecError("bytes behind the value")
    return value


class _Reader:
    """Bytes and how far they are read."""

    def __init__(self, data: bytes, resolve: Callable[[bytes, int], Any]) -> None:
        self.data, self.resolve = data, resolve
        self.at = self.n_items = 0

    def take(self, n_bytes: int) -> bytes:
        end = self.at + n_bytes
        if end > len(self.data):
            raise CodecError("a value that ends early")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def sized(self) -> bytes:
        return self.take(_U32.unpack(self.take(4))[0])

    def value(self, depth: int) -> Any:
        self.n_items += 1
        if depth == 0 or self.n_items > MAX_ITEMS:
            raise CodecError(f"a value deeper than {MAX_DEPTH} or of more than {MAX_ITEMS} items")
        tag = self.take(1)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"i":
            return int.from_bytes(self.sized(), "little", signed=True)
        if tag == b"f":
            return _DOUBLE.unpack(self.take(8))[0]
        if tag == b"s":
            return self.sized().decode("utf-8", "surrogatepass")
        if tag in b"ba":
            return self.sized() if tag == b"b" else bytearray(self.sized())
        if tag == b"c":
            return complex(*_COMPLEX.unpack(self.take(16)))
        if tag == b"p":
            code = self.take(1)
            if code not in _PACKED.values():
                raise CodecError("an unknown array")
            return array(code.decode(), self.sized()).tolist()
        if tag in _SEQUENCES or tag == b"D":
            return self.container(tag, depth - 1)
        if tag == b"x":
            name, *arguments = self.value(depth - 1)
            if any(type(argument) not in (int, str) for argument in arguments):
                raise CodecError(f"odd arguments for {name}")
            return _REMADE[name][0](*arguments)
        if tag == b"X":
            return _TYPES[self.value(depth - 1)]
        if tag in b"my":
            return self.resolve(tag, int.from_bytes(self.take(8), "little"))
        raise CodecError(f"an unknown tag {tag!r}")

    def container(self, tag: bytes, depth: int) -> Any:
        (n_items,) = _U32.unpack(self.take(4))
        if n_items > len(self.data) - self.at:  # each item takes a byte at least
            raise CodecError("a value that ends early")
        if tag == b"D":
            return {self.value(depth): self.value(depth) for _ in range(n_items)}
        return _SEQUENCES[tag]([self.value(depth) for _ in range(n_items)])
