"""The app: routes, errors, health, metrics, the page, and a model that loads meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from codellama.artifact import code_version
from codellama.engine.endpoint import Endpoint
from codellama.serve import llamacpp, ollama, openai, tabby
from codellama.serve.guard import MAX_HEADER_BYTES, Guard, Protocol, Rules
from codellama.serve.replies import ApiError, as_json
from codellama.serve.service import Ready, Service, failed

_log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
CHECK_S = 2.0  # between looks at the servers of a cluster


class _ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int


class _Error(BaseModel):
    error: _ErrorDetail


class _OllamaError(BaseModel):
    error: str


def create_app(
    load: Callable[[], Service],
    rules: Rules = Rules(),  # noqa: B008  frozen
    on_failure: Callable[[Exception], object] = lambda error: None,
) -> Any:
    """The ASGI app; the service is made in a thread once it listens, unless that fails."""

    async def start(app: FastAPI) -> None:
        try:
            service = await asyncio.to_thread(load)
        except Exception as error:  # noqa: BLE001  the caller decides what becomes of it
            on_failure(error)
            return
        known: dict[str, str | None] = {}
        while isinstance(service.source, Endpoint):
            problems = await service.source.check()
            for url, problem in problems.items() - known.items():
                _log.warning("%s: %s", url, problem or "answers")
            known = problems
            if service.source.failure is None:  # once a server of the cluster has answered
                service.max_context, app.state.service = service.source.max_context, service
            await asyncio.sleep(CHECK_S)
        app.state.service = service

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.ensure_future(start(app))
        yield
        starting.cancel()

    app = FastAPI(
        title="codellama",
        version=code_version(),
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = None
    for part in (openai, llamacpp, tabby):
        app.include_router(part.router, responses=_replies(_Error, "text/event-stream"))
    app.include_router(ollama.router, responses=_replies(_OllamaError, "application/x-ndjson"))

    @app.get("/health", responses=_replies(_Error))
    async def health(service: Ready) -> Response:
        """Whether the server can answer."""
        return as_json({"status": "ok"})

    @app.get("/metrics", responses=_replies(_Error), response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus' format."""
        service: Service | None = app.state.service
        text = b"" if service is None else generate_latest(service.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    _answer_errors(app)
    rules = replace(rules, open_paths=frozenset({"/health", "/", *_add_page(app)}))
    guarded = Guard(app, rules, app.state)
    if not rules.origins:
        return guarded
    methods, headers = ["GET", "POST"], ["authorization", "content-type"]
    return CORSMiddleware(guarded, rules.origins, allow_methods=methods, allow_headers=headers)


def _replies(error: type[BaseModel], stream: str | None = None) -> dict[int | str, Any]:
    """What the document says of replies, beside JSON: streams, and the shape of errors."""
    known: dict[int | str, Any] = {200: {"content": {stream: {}}}} if stream else {}
    for status, text in (("4XX", "Not as expected."), ("5XX", "Failed, or not ready.")):
        known[status] = {"model": error, "description": text}
    return known


def _add_page(app: FastAPI) -> list[str]:
    """Serve the files of the page and return their paths."""

    async def send(http: HttpRequest) -> Response:
        return FileResponse(files[http.url.path])

    async def index(http: HttpRequest) -> Response:
        if "/index.html" in files and "text/html" in http.headers.get("accept", ""):
            return FileResponse(files["/index.html"])
        return PlainTextResponse("Ollama is running")  # what Ollama's clients look for

    files = {f"/{f.relative_to(PAGE).as_posix()}": f for f in PAGE.rglob("*") if f.is_file()}
    for path in ("/", *files):
        app.add_route(path, send if path in files else index, include_in_schema=False)
    return list(files)


def _answer_errors(app: FastAPI) -> None:
    """Every error in the shape of its dialect, none with a stack trace."""

    def translated(error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            names = [str(part) for part in first["loc"][1:] if part not in ("openai", "tabby")]
            where = ".".join(names) or "body"
            return ApiError(400, f"{where}: {first['msg']}", where)
        if isinstance(error, HTTPException):
            return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
        # A mistake in what was asked is a ValueError everywhere in this package.
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            return ApiError(400, str(error))
        return failed(error)

    async def answer(http: HttpRequest, error: Exception) -> Response:
        return translated(error).response(http.url.path)

    for kind in (ApiError, RequestValidationError, HTTPException, ValueError, Exception):
        app.add_exception_handler(kind, answer)


class Server(uvicorn.Server):
    """uvicorn, with time for what is under way when it is told to end."""

    def __init__(self, config: uvicorn.Config, grace_s: float, end: Callable[[], object]) -> None:
        super().__init__(config)
        self.grace_s, self.end = grace_s, end

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn, but without killing itself by the same signal at the end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more requests, let the others finish, then cut them off."""
        asyncio.get_running_loop().call_later(self.grace_s, self.end)
        await super().shutdown(sockets)


def serve(
    load: Callable[[], Service], host: str, port: int, rules: Rules, grace_s: float = 30.0
) -> None:
    """Serve until a signal comes; what is under way then gets so long to finish.

    Raises:
        Exception: why the model could not be loaded.
        SystemExit: the address cannot be used.
    """
    services: list[Service] = []
    failures: list[Exception] = []

    def kept() -> Service:
        services.append(load())
        return services[0]

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    def end() -> None:
        for service in services:
            service.end(ApiError(503, "the server ends"))

    config = uvicorn.Config(
        create_app(kept, rules, fail),
        host,
        port,
        http=Protocol,
        ws="none",
        access_log=False,  # it would hold what clients write into addresses
        log_level="warning",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(grace_s) + 5,
    )
    server = Server(config, grace_s, end)
    server.run()
    if failures:
        raise failures[0]
