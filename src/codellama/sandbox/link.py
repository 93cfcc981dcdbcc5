"""The line between candidate and judge: requests and answers, each a length and coded values.

Both ends are the same. While an end waits for an answer it serves requests of the other, so that a
test may pass a function to the candidate. What a request means is given by the owner of the end.
"""

from __future__ import annotations

import builtins
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from codellama.sandbox import codec

_LENGTH = struct.Struct("<I")
_MAX_OBJECTS = 100_000
_MAX_NESTED = 50  # calls that call back that call


class LineError(BaseException):
    """The other side is gone or does not keep to the protocol; no `except Exception` hides it."""


class Link:
    """One end of the line."""

    def __init__(
        self,
        connection: socket.socket,
        serve: Callable[..., Any],
        stand_in: Any,
        may_share: Callable[[Any], bool],
    ) -> None:
        """`serve(op, *arguments)` answers requests; `stand_in(number)` is made for an object there
        and goes back as what it stands for; `may_share` tells which objects may be referred to.
        """
        self._connection, self._serve, self._stand_in = connection, serve, stand_in
        self._reader = os.fdopen(connection.fileno(), "rb", closefd=False)  # fewer calls
        self._may_share = may_share
        self._own: dict[int, Any] = {}  # number -> object that the other side may refer to
        self._numbers: dict[int, int] = {}  # id of the object -> number
        self._theirs: dict[int, Any] = {}
        self._n_nested = 0
        self.raise_error: Callable[[Any], BaseException] = as_exception

    def ask(self, *request: Any) -> Any:
        """Send a request and return the answer, or raise what it raised there."""
        self._send("?", request)
        while True:
            kind, content = self._receive()
            if kind == "=":
                return content
            if kind == "!":
                raise self.raise_error(content) from None
            if kind != "?":
                raise LineError("an unknown kind of message")
            self._answer(content)

    def serve_forever(self) -> None:
        """Answer requests until the other side closes the line."""
        while True:
            _, content = self._receive()
            self._answer(content)

    def _answer(self, request: Any) -> None:
        self._n_nested += 1
        if self._n_nested > _MAX_NESTED or type(request) is not tuple or not request:
            raise LineError("calls nested too deep")
        try:
            result = ("=", self._serve(*request))
        except LineError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it raised is the answer
            result = ("!", describe_exception(error))
        self._n_nested -= 1
        try:
            self._send(*result)
        except codec.CodecError as error:
            self._send("!", describe_exception(error))

    def _send(self, kind: str, content: Any) -> None:
        data = codec.encode((kind, content), self._refer)
        try:
            self._connection.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LineError(str(error)) from None

    def _receive(self) -> tuple[str, Any]:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > codec.MAX_BYTES:
            raise LineError("a message that is too long")
        try:
            kind, content = codec.decode(self._read(length), self._resolve)
        except (codec.CodecError, ValueError, TypeError) as error:
            raise LineError(str(error)) from None
        return kind, content

    def _read(self, n_bytes: int) -> bytes:
        try:
            data = self._reader.read(n_bytes)
        except OSError as error:
            raise LineError(str(error)) from None
        if len(data) < n_bytes:
            raise LineError("the other side has ended")
        return data

    def _refer(self, value: Any) -> tuple[bytes, int]:
        if type(value) is self._stand_in:
            return b"y", value.remote_number
        if not self._may_share(value):
            raise codec.CodecError(
                f"a {type(value).__name__} cannot leave its process; judge with in_process=True"
            )
        number = self._numbers.get(id(value))
        if number is None:
            number = len(self._own)
            if number >= _MAX_OBJECTS:
                raise codec.CodecError(f"more than {_MAX_OBJECTS} objects have gone across")
            self._own[number] = value  # kept, so that its id stays its own
            self._numbers[id(value)] = number
        return b"m", number

    def _resolve(self, side: bytes, number: int) -> Any:
        if side == b"y":  # of theirs: mine
            if number not in self._own:
                raise LineError("a number that stands for nothing")
            return self._own[number]
        if number not in self._theirs:
            if len(self._theirs) >= _MAX_OBJECTS:
                raise codec.CodecError("too many objects")
            self._theirs[number] = self._stand_in(number)
        return self._theirs[number]


def describe_exception(error: BaseException) -> tuple[list[str], str, tuple[Any, ...]]:
    """Names of its classes up to the first of the language, that one, and plain arguments."""
    names = []
    for kind in type(error).__mro__:
        if kind.__module__ == "builtins":
            break
        names.append(kind.__name__)
    else:
        kind = Exception
    plain = (int, float, str, bool, type(None))
    arguments = tuple(a if type(a) in plain else repr(a)[:1000] for a in error.args[:8])
    return names, kind.__name__, arguments


def as_exception(content: Any, own_kinds: dict[str, type[Exception]] | None = None) -> Exception:
    """An exception like the one described; what would end an interpreter becomes a RuntimeError.

    `own_kinds` are stand-ins for exception classes of the other side, by name.
    """
    try:
        names, name, arguments = content
        kind = next((own_kinds[n] for n in names if own_kinds and n in own_kinds), None)
        kind = kind or vars(builtins).get(name)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return RuntimeError(f"the candidate raised {name}")
        return kind(*arguments)
    except (TypeError, ValueError):
        return RuntimeError("the candidate raised an exception")
