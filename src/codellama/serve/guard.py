"""Who may ask, and how much: everything that is decided before a body is understood.

Around the app: keys, hosts and origins, size and shape of bodies, and the end of a request whose
client has gone. Around the connection: clients that send or read too slowly.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from codellama.serve.admission import refuse
from codellama.serve.replies import ApiError
from codellama.serve.service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

REQUEST_S = 8.0  # for a whole request to arrive
READ_S = 30.0  # for a client that has stopped reading
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Rules:
    """What the guard enforces."""

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = LOOPBACK
    """Names under which the server may be asked, against rebinding; None allows any."""
    origins: tuple[str, ...] = ()
    """Foreign origins that a browser may ask from."""
    open_paths: Collection[str] = ("/health",)
    """What needs no key."""
    max_body_bytes: int = 4 << 20


class Guard:
    """ASGI around an app: refuses what may not pass, and ends what nobody waits for."""

    def __init__(self, app: App, rules: Rules, state: Any) -> None:
        self.app, self.rules, self.state = app, rules, state
        self._keys = [key.encode() for key in rules.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0

        async def noted(message: Any) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_whole = not message.get("more_body")
            await send(message)

        is_whole = False
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, noted)
            self._count(scope, status)
            return
        if body is None:  # left while sending
            return
        left = asyncio.Event()
        task = asyncio.ensure_future(self.app(scope, _replayed(body, left), noted))

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            if not is_whole:
                task.cancel()

        watcher = asyncio.ensure_future(watch())
        try:
            await task
        except asyncio.CancelledError:
            if not left.is_set():
                task.cancel()  # the server itself ends
                raise
        finally:
            watcher.cancel()
            self._count(scope, status)

    def _count(self, scope: Scope, status: int) -> None:
        service: Service | None = self.state.service
        if service is not None:
            route = getattr(scope.get("route"), "path", "other")  # not what a client made up
            service.metrics.requests.labels(route, status or "left").inc()

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") else host
        name = (name if ":" in host else host).strip("[]").lower()
        if self.rules.hosts is not None and name not in self.rules.hosts:
            raise ApiError(403, "host: expected a name of this machine")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self.rules.origins and origin.partition("://")[2] != host:
            raise ApiError(403, "origin: not allowed; --allow-origin names those that are")
        service: Service | None = self.state.service
        if scope["path"] not in self.rules.open_paths and scope["method"] != "OPTIONS":
            self._check_key(headers)
            if scope["method"] == "POST" and service and service.admission.is_full:
                refuse()

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All are compared, each in a time that does not depend on where they differ.
        matches = [hmac.compare_digest(key, given) for key in self._keys]
        if self._keys and not (any(matches) and scheme.lower() == b"bearer"):
            raise ApiError(
                401,
                "authorization: expected `Bearer` and a key of this server",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, checked to be JSON; None where the client left."""
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return b""
        body = bytearray()
        try:
            async with asyncio.timeout(REQUEST_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.rules.max_body_bytes:
                        most = self.rules.max_body_bytes
                        raise ApiError(413, f"the body is larger than {most} bytes")
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            message = f"the body did not arrive within {REQUEST_S:g} s"
            raise ApiError(408, message, headers={"connection": "close"}) from None
        if scope["method"] == "POST":
            kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
            kind = kind.partition(";")[0].strip().lower()
            if body and kind != "application/json":
                raise ApiError(415, f"content-type {kind[:80]!r}: expected application/json")
            try:
                from_json(bytes(body), allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not JSON: {error}") from None
        return bytes(body)


def _replayed(body: bytes, left: asyncio.Event) -> Receive:
    """A `receive` with the body in one piece, then nothing until the client leaves."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    return receive


class Protocol(H11Protocol):
    """A connection that ends where its client sends a request, or reads a reply, too slowly."""

    _arrival: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._arrival = self.loop.call_later(REQUEST_S, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Take in bytes; the first of a later request start the clock again."""
        if self._arrival is None and (self.cycle is None or self.cycle.response_complete):
            self._arrival = self.loop.call_later(REQUEST_S, self._too_slow)
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        self._stop_waiting()
        self._resume()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read: give it a while."""
        super().pause_writing()
        self._reading = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._resume()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the shape of all errors."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        self._refuse(status, msg)

    def _too_slow(self) -> None:
        self._arrival = None
        if not self.transport.is_closing():
            self._refuse(408, f"the request did not arrive within {REQUEST_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Reply without h11, which is in no state to, and close."""
        body = json.dumps(ApiError(status, message).body("/")).encode()
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _stop_waiting(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _resume(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
