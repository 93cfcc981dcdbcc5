"""Replies: JSON, server-sent events, lines of JSON, and errors in the shape of each dialect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

PING_S = 10.0
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """An error that the client hears of."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.kind = kind or TYPES.get(status, "invalid_request_error")
        self.code = code or status
        self.headers = headers or {}

    def body(self, path: str) -> dict[str, Any]:
        """The JSON of the error in the dialect of a path."""
        if path.startswith("/api/"):
            return {"error": self.message}
        known = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": known}

    def response(self, path: str) -> Response:
        """The whole reply."""
        return as_json(self.body(path), self.status, self.headers)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | int


class ErrorBody(BaseModel):
    """Every error, except Ollama's."""

    error: ErrorDetail


class OllamaError(BaseModel):
    """An error below /api/."""

    error: str


@contextmanager
def user_mistakes() -> Iterator[None]:
    """What is wrong with a request becomes a 400."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON reply; ASCII, so that there is no text that it cannot carry."""
    return Response(json.dumps(value), status, headers, "application/json")


async def as_events(chunks: AsyncGenerator[Any], done: bool = True) -> Response:
    """Server-sent events, with [DONE] behind the last where asked."""

    def line(chunk: Any) -> bytes:
        return f"data: {json.dumps(chunk)}\n\n".encode()

    last = b"data: [DONE]\n\n" if done else b""
    return await _streamed(chunks, line, last, b": wait\n\n", "text/event-stream")


async def as_lines(chunks: AsyncGenerator[Any]) -> Response:
    """One JSON object on each line."""

    def line(chunk: Any) -> bytes:
        return json.dumps(chunk).encode() + b"\n"

    return await _streamed(chunks, line, b"", b"", "application/x-ndjson")


async def _streamed(
    chunks: AsyncGenerator[Any], line: Any, last: bytes, ping: bytes, media_type: str
) -> Response:
    """Stream chunks; an error before the first is still a reply of its own.

    Where the first takes long, the reply begins without it and comments keep the line open.
    """
    first = asyncio.ensure_future(anext(chunks))
    try:
        await asyncio.wait({first}, timeout=PING_S)
        if first.done():
            first.result()
    except BaseException:
        await _close(first, chunks)
        raise

    async def body() -> AsyncIterator[bytes]:
        try:
            while not first.done():
                yield ping
                await asyncio.wait({first}, timeout=PING_S)
            yield line(first.result())
            async for chunk in chunks:
                yield line(chunk)
            yield last
        except ApiError as error:
            yield line(error.body("/api/" if media_type == "application/x-ndjson" else "/"))
        finally:
            await _close(first, chunks)

    return StreamingResponse(body(), headers={"cache-control": "no-store"}, media_type=media_type)


async def _close(first: asyncio.Future[Any], chunks: AsyncGenerator[Any]) -> None:
    if not first.done():
        first.cancel()
        await asyncio.wait({first})
    await chunks.aclose()
