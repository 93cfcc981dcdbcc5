"""The Endpoint: the Engine's interface over any number of OpenAI-compatible servers.

With a tokenizer, prompts are sent as ids, so that infilling and chat are exactly those of training,
whatever a server thinks of them; without one, its own `suffix` and chat template are used. The
least busy server is asked first, and another where a request fails before its first text. HTTP is
spoken in a thread of its own, for `pieces` in the caller's event loop.
"""

from __future__ import annotations

import asyncio
import functools
import random
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import httpx

from codellama.engine.generator import Ask, Generator, Prompt, Put
from codellama.engine.sampling import MAX_TOKENS, SamplingParams
from codellama.engine.sequence import Piece
from codellama.engine.upstream import FailedError, Upstream
from codellama.tokenizer import Tokenizer

T = TypeVar("T")
CONNECT_S = 10.0


class Endpoint(Generator):
    """Generates with models behind addresses.

    Args:
        urls: where they are; all must serve the same model.
        model: the name to ask for; the first that each server lists by default.
        tokenizer: the model's; prompts are then sent as ids.
        max_in_flight: requests under way to each server.
        timeout_s: for which a server may say nothing; where texts come whole, all their time.
        n_attempts: tries of one request, each on another server where there is one.

    Raises:
        ValueError: no address, or one that is none.
    """

    tokenizer: Tokenizer | None

    def __init__(
        self,
        urls: Sequence[str] | str,
        model: str | None = None,
        api_key: str | None = None,
        tokenizer: Tokenizer | None = None,
        max_in_flight: int = 64,
        timeout_s: float = 600.0,
        n_attempts: int = 6,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else urls
        if not urls:
            raise ValueError("endpoint: expected at least one address")
        self._upstreams = [Upstream(url, model, tokenizer) for url in urls]
        self.tokenizer = tokenizer
        self._n_in_flight, self._n_attempts = max_in_flight * len(urls), n_attempts
        self._settings: dict[str, Any] = {
            "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None),
            "limits": httpx.Limits(max_connections=None),
        }
        # Connections and semaphores belong to a loop.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient]
        self._places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
        self._clients, self._places = WeakKeyDictionary(), WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    def score(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probabilities of each text's tokens after the first.

        Raises:
            ValueError: as `complete`, or a server gives no log-probabilities of prompts.
        """
        # One token more, because some servers refuse to write none.
        params = SamplingParams(1, logprobs=True)
        asks = [replace(self._continuation(p), params=params, echo=True) for p in prompts]
        if any(isinstance(ask.prompt, str) for ask in asks):
            raise ValueError("score: an endpoint needs the model's tokenizer for texts")
        results: list[list[float]] = [[] for _ in asks]
        for number, piece in self._run(asks, every_step=False):
            if piece.finish_reason is None:
                results[number] = list(piece.logprobs[1 : len(asks[number].prompt)])
        for ask, scores in zip(asks, results, strict=True):
            if len(scores) != len(ask.prompt) - 1 or None in scores:
                names = ", ".join(upstream.url for upstream in self._upstreams)
                raise ValueError(f"{names}: gives no log-probabilities of prompts (echo)")
        return results

    def pieces(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop_ids: Sequence[int],
        whole: bool = False,
    ) -> AsyncGenerator[Piece]:
        """As `Engine.pieces`; a FailedError where servers are busy, for which it does not wait."""
        return self._pieces(Ask(prompt, stop_ids, params=params), not whole, waits=False)

    def cancel(self) -> None:
        """End all that was asked through this, except `pieces`; callers get what there is."""
        if self._tasks:
            self._cancel(self._tasks)

    async def check(self) -> dict[str, str | None]:
        """Ask every server for its model: what is wrong with each, None where nothing."""
        asked = (upstream.describe(self._client()) for upstream in self._upstreams)
        found = await asyncio.gather(*asked, return_exceptions=True)
        for upstream, error in zip(self._upstreams, found, strict=True):
            upstream.note(error)
        return {upstream.url: upstream.problem for upstream in self._upstreams}

    @property
    def model(self) -> str:
        """The name that is asked for.

        Raises:
            ConnectionError: no server says one.
        """
        if not any(upstream.model for upstream in self._upstreams):
            self._wait(self.check())
        name = next((upstream.model for upstream in self._upstreams if upstream.model), None)
        if name is None:
            raise ConnectionError(self.failure)
        return name

    @property
    def max_context(self) -> int:
        """The shortest context of all servers that tell; asks them the first time."""
        if all(upstream.max_context is None for upstream in self._upstreams):
            self._wait(self.check())
        return min(upstream.max_context or MAX_TOKENS for upstream in self._upstreams)

    @property
    def failure(self) -> str | None:
        """What was wrong with each server's last answer, where that is so of all."""
        if any(upstream.problem is None for upstream in self._upstreams):
            return None
        return "; ".join(f"{upstream.url}: {upstream.problem}" for upstream in self._upstreams)

    def _write(self, asks: Sequence[Ask], every_step: bool, put: Put, stack: ExitStack) -> None:
        tasks: set[asyncio.Task[None]] = set()
        stack.callback(self._cancel, tasks)

        async def collect(number: int, ask: Ask) -> None:
            async with aclosing(self._pieces(ask, every_step)) as pieces:
                async for piece in pieces:
                    put(number, piece)

        def note_end(number: int, task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                put(number, Piece("", (), (), (), "cancelled", 0))
            elif error := task.exception():
                put(number, error)

        async def start() -> None:
            for number, ask in enumerate(asks):
                task = asyncio.ensure_future(collect(number, ask))
                task.add_done_callback(functools.partial(note_end, number))
                tasks.add(task)
            self._tasks.update(tasks)

        self._wait(start())

    async def _pieces(self, ask: Ask, streams: bool, waits: bool = True) -> AsyncGenerator[Piece]:
        """The pieces of a text from whichever server gives it."""
        if ask.params.max_tokens == 0:  # some servers refuse it, others take it for no limit
            yield Piece("", (), (), (), "length", 0)
            return
        tried: set[Upstream] = set()
        places = asyncio.Semaphore(self._n_in_flight)
        async with self._places.setdefault(asyncio.get_running_loop(), places):
            for n_left in reversed(range(self._n_attempts)):
                now = time.monotonic()
                upstream = min(
                    self._upstreams, key=lambda u: (u in tried, u.resting_until > now, len(u.busy))
                )
                if not waits and upstream.busy_until > now:
                    raise FailedError(f"{upstream.url}: busy", upstream.busy_until - now, True)
                if upstream.resting_until > now:
                    await asyncio.sleep((upstream.resting_until - now) * random.uniform(1, 1.2))
                tried.add(upstream)
                has_begun, place = False, object()
                upstream.busy.add(place)
                try:
                    async with aclosing(upstream.pieces(self._client(), ask, streams)) as pieces:
                        async for piece in pieces:
                            has_begun = True
                            yield piece
                    upstream.note(None)
                    return
                except (httpx.HTTPError, FailedError) as error:
                    upstream.note(error)
                    if not n_left and not waits and upstream.busy_until > now:
                        raise
                    if has_begun or not n_left:
                        reason = str(error) or type(error).__name__
                        raise ConnectionError(f"{upstream.url}: {reason}") from None
                finally:
                    upstream.busy.discard(place)

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = httpx.AsyncClient(**self._settings)
        return self._clients[loop]

    @functools.cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="codellama-endpoint", daemon=True).start()
        return loop

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _cancel(self, tasks: set[asyncio.Task[None]]) -> None:
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
