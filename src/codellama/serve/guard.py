"""Who may ask, and how much: everything that is decided before a body is understood.

Around the app: keys, hosts, origins, the size and form of bodies, and the end of a request whose
client has gone. Around the connection: clients that send or read too slowly.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import from_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from codellama.serve.replies import ApiError, as_text
from codellama.serve.service import Service, arrived, busy, is_long

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

REQUEST_S = 8.0  # for a whole request to arrive
READ_S = 30.0  # for a client that has stopped reading
MAX_HEADER_BYTES = 32 << 10
LONG_BYTES = 64 << 10  # encoding as much takes about 20 ms
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*(?=\r\n|\Z)", re.IGNORECASE)
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Rules:
    """What the guard enforces."""

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = LOOPBACK
    """Names under which the server may be asked, against rebinding; None allows any."""
    origins: tuple[str, ...] = ()
    """Foreign origins that a browser may ask from."""
    max_body_bytes: int = 4 << 20
    open_paths: frozenset[str] = frozenset({"/health"})
    """What needs no key."""


class Guard:
    """ASGI around an app: refuses what may not pass, and ends what nobody waits for."""

    def __init__(self, app: Any, rules: Rules, state: Any) -> None:
        self.app, self.rules, self.state = app, rules, state
        self.arriving: set[Protocol] = set()
        """Connections whose whole request has come and is neither admitted nor refused yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, is_whole = 0, False

        async def noted(message: Any) -> None:
            nonlocal status, is_whole
            status = message.get("status", status)
            is_whole = not message.get("more_body", message["type"] == "http.response.start")
            await send(message)

        try:
            await self._pass(scope, receive, noted, lambda: is_whole)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, noted)
        except Exception:  # the app has answered and logged it, without its message
            if not status:
                raise
        finally:
            arrived.get()()
            service: Service | None = self.state.service
            if service is not None:
                path = getattr(scope.get("route"), "path", "other")  # not what a client made up
                service.metrics.requests.labels(path, status or "left").inc()

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, is_whole: Callable[[], bool]
    ) -> None:
        """Run the app, until its end or the client's."""
        self._check(scope)
        body = await self._body(scope, receive)
        is_long.set(len(body) > LONG_BYTES)
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def replayed() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            if not is_whole():
                task.cancel()

        task = asyncio.ensure_future(self.app(scope, replayed, send))
        watcher = asyncio.ensure_future(watch())
        try:
            await task
        except asyncio.CancelledError:
            if not left.is_set():  # the server itself ends
                task.cancel()
                raise
        finally:
            watcher.cancel()

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")
        host, origin = headers.get(b"host", ""), headers.get(b"origin", "")
        name = host.removeprefix("[").partition("]")[0] if "]" in host else host.partition(":")[0]
        if self.rules.hosts is not None and name.lower() not in self.rules.hosts:
            raise ApiError(403, "host: expected a name of this machine")
        if origin and origin not in self.rules.origins and origin.partition("://")[2] != host:
            raise ApiError(403, "origin: expected this server, or one that it was told to allow")
        if scope["path"] in self.rules.open_paths:
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        # All are compared, each in a time that does not depend on where they differ.
        matches = [hmac.compare_digest(key.encode(), given.encode()) for key in self.rules.keys]
        if matches and not (any(matches) and scheme.lower() == "bearer"):
            message = "authorization: expected `Bearer` and a key of this server"
            wanted = {"www-authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=wanted)
        service: Service | None = self.state.service
        if scope["method"] == "POST" and service is not None and service.n_left < 1:
            raise busy()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body; of a POST, JSON."""
        body, most = bytearray(), self.rules.max_body_bytes
        try:
            async with asyncio.timeout(REQUEST_S):
                message = {"more_body": True}
                while message.get("more_body"):
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise ApiError(413, f"the body is larger than {most} bytes")
        except TimeoutError:
            message = f"the body did not arrive within {REQUEST_S:g} s"
            raise ApiError(408, message, headers={"connection": "close"}) from None
        if scope["method"] == "POST" and body:
            kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip()
            if kind.lower() != b"application/json":
                raise ApiError(415, "content-type: expected application/json")
            try:
                from_json(bytes(body), allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not JSON: {error}") from None
        return bytes(body)


class Protocol(H11Protocol):
    """A connection that ends where its client sends a request, or reads a reply, too slowly."""

    _clocks: dict[str, asyncio.TimerHandle]

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._clocks = {}
        self._start("request", REQUEST_S, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Take in bytes; the first of a later request start the clock again."""
        is_first = self.cycle is None or self.cycle.response_complete
        if is_first and "request" not in self._clocks:
            self._start("request", REQUEST_S, self._too_slow)
        guard = self.app  # it is within another where foreign origins are told of refusals, too
        if is_first and isinstance(guard, Guard):
            arrived.set(partial(guard.arriving.discard, self))  # the request's task takes it along
            service: Service | None = guard.state.service
            if service is not None and _is_whole_post(data):
                # The app would refuse a thousand at once within 0.5 s, not 0.1. Keys and hosts are
                # not looked at: who has no right to ask hears only that the server is busy.
                if service.n_left <= len(guard.arriving):
                    service.metrics.requests.labels("other", 429).inc()
                    return self._refuse(busy(), is_ollama=data.startswith(b"POST /api/"))
                guard.arriving.add(self)
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("request")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        for name in list(self._clocks):
            self._stop(name)
        if isinstance(self.app, Guard):
            self.app.arriving.discard(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read: give it a while."""
        super().pause_writing()
        self._start("reply", READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop("reply")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(ApiError(getattr(sys.exc_info()[1], "error_status_hint", 400), msg))

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self._refuse(ApiError(408, f"the request did not arrive within {REQUEST_S:g} s"))

    def _refuse(self, error: ApiError, is_ollama: bool = False) -> None:
        """Reply in the shape of all errors, without h11, which may be in no state to, and close."""
        body = as_text(error.body(is_ollama))
        fixed = {"content-type": "application/json", "connection": "close"}
        headers = error.headers | fixed | {"content-length": str(len(body))}
        lines = [f"HTTP/1.1 {error.status} Refused", *(f"{k}: {v}" for k, v in headers.items())]
        self.transport.write("\r\n".join([*lines, "", body]).encode())
        self.transport.close()

    def _start(self, name: str, seconds: float, end: Callable[[], object]) -> None:
        self._clocks[name] = self.loop.call_later(seconds, end)

    def _stop(self, name: str) -> None:
        if clock := self._clocks.pop(name, None):
            clock.cancel()


def _is_whole_post(data: bytes) -> bool:
    """Whether nothing of the request is still to come: a reply before that could be lost."""
    head, _, body = data.partition(b"\r\n\r\n")
    length = _LENGTH.search(head) if data.startswith(b"POST ") else None
    return length is not None and int(length[1]) == len(body)
