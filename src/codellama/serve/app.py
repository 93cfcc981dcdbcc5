"""The app: routes, errors, health, metrics, the page, and a model that loads meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
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
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from codellama.artifact import code_version
from codellama.serve import llamacpp, ollama, openai, tabby
from codellama.serve.guard import Guard, Protocol, Rules
from codellama.serve.replies import ApiError, ErrorBody, OllamaError, as_json
from codellama.serve.service import Service, failed

PAGE = Path(__file__).parent / "page"
MAX_HEADER_BYTES = 32 << 10


def create_app(
    load: Callable[[], Service],
    rules: Rules = Rules(),  # noqa: B008  frozen
    on_failure: Callable[[Exception], object] = lambda error: None,
) -> Any:
    """The ASGI app.

    Args:
        load: makes the service; called in a thread once the server listens.
        on_failure: called when that fails.
    """

    async def start(app: FastAPI) -> None:
        try:
            app.state.service = await asyncio.to_thread(load)
        except Exception as error:  # noqa: BLE001  the caller decides what becomes of it
            on_failure(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(start(app))
        yield
        loading.cancel()
        if app.state.service is not None:
            app.state.service.source.cancel()

    shape: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorBody, "description": "What is wrong with the request."},
        "5XX": {"model": ErrorBody, "description": "The server failed or is not ready."},
    }
    ollama_shape: dict[int | str, dict[str, Any]] = {
        status: {**entry, "model": OllamaError} for status, entry in shape.items()
    }
    app = FastAPI(
        title="codellama",
        version=code_version(),
        docs_url=None,  # their page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = None
    for part in (openai, llamacpp, tabby):
        app.include_router(part.router, responses=shape)
    app.include_router(ollama.router, responses=ollama_shape)

    @app.get("/health", responses=shape)
    async def health() -> Response:
        """Whether the server can answer."""
        service: Service | None = app.state.service
        if service is None:
            raise ApiError(503, "Loading model", headers={"retry-after": "1"})
        if service.source.failure is not None:
            raise ApiError(503, "the engine has stopped")
        return as_json({"status": "ok"})

    @app.get("/metrics", responses=shape, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus' format."""
        service: Service | None = app.state.service
        if service is None:
            raise ApiError(503, "Loading model")
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    _add_errors(app)
    rules = replace(rules, open_paths={"/health", "/", *_add_page(app)})
    guarded = Guard(app, rules, app.state)
    if not rules.origins:
        return guarded
    return CORSMiddleware(
        guarded, rules.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
    )


def _add_page(app: FastAPI) -> list[str]:
    """Serve the files of the page and return their paths; they hold no secrets."""

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(http: HttpRequest) -> Response:
        if "text/html" in http.headers.get("accept", "") and (PAGE / "index.html").exists():
            return FileResponse(PAGE / "index.html")
        return PlainTextResponse("Ollama is running")  # what Ollama's clients look for

    files = {f"/{f.relative_to(PAGE).as_posix()}": f for f in PAGE.rglob("*") if f.is_file()}
    for path, file in files.items():
        app.add_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)
    return list(files)


def _sender(file: Path) -> Callable[[HttpRequest], Response]:
    return lambda http: FileResponse(file)


def _add_errors(app: FastAPI) -> None:
    """Every error in the shape of its dialect, none with a stack trace."""

    async def known(http: HttpRequest, error: ApiError) -> Response:
        return error.response(http.url.path)

    async def invalid(http: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return ApiError(400, f"{where}: {first['msg']}", param=where).response(http.url.path)

    async def plain(http: HttpRequest, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path[:200]}: {error.detail}"
        reply = ApiError(error.status_code, message, headers=dict(error.headers or {}))
        return reply.response(http.url.path)

    async def unknown(http: HttpRequest, error: Exception) -> Response:
        return failed(error).response(http.url.path)

    handlers: dict[Any, Any] = {ApiError: known, RequestValidationError: invalid}
    for kind, handler in (handlers | {HTTPException: plain, Exception: unknown}).items():
        app.add_exception_handler(kind, handler)


class Server(uvicorn.Server):
    """uvicorn, which ends well when it is told to end: what is under way gets its time."""

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
    """Serve until a signal comes.

    Args:
        grace_s: what is under way then gets so long to finish.

    Raises:
        Exception: why the model could not be loaded.
        SystemExit: the address cannot be used.
    """
    failures: list[Exception] = []
    services: list[Service] = []

    def loaded() -> Service:
        services.append(load())
        return services[0]

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    config = uvicorn.Config(
        create_app(loaded, rules, fail),
        host,
        port,
        http=Protocol,
        ws="none",
        access_log=False,  # it would hold what clients write into addresses
        log_level="warning",
        backlog=2048,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(grace_s) + 5,
    )
    server = Server(config, grace_s, lambda: [s.source.cancel() for s in services])
    server.run()
    if failures:
        raise failures[0]
