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
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import httpx

from codellama.engine.sampling import MAX_TOKENS, SamplingParams
from codellama.engine.sequence import Completion, Piece
from codellama.engine.upstream import Ask, FailedError, Upstream, fields_of
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.chat import Message
from codellama.tokenizer.chat import stop_ids as chat_stop_ids
from codellama.tokenizer.infilling import stop_ids as infilling_stop_ids

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams]
OnText = Callable[[int, str], None]
T = TypeVar("T")
CONNECT_S = 10.0
_EOT_TEXT = " <EOT>"  # what servers that do not know stop_token_ids may write for it


class Endpoint:
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
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None)
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient]
        self._clients = WeakKeyDictionary()  # connections belong to a loop
        self._tasks: set[asyncio.Task[None]] = set()

    def complete(
        self,
        prompts: Sequence[Prompt],
        params: Params | None = None,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """As `Engine.complete`; so are the others.

        Raises:
            ValueError: a server refuses a request; names it and repeats its reason.
            ConnectionError: none answers.
        """
        if isinstance(prompts, str):
            raise ValueError("expected a list of prompts, got one text")
        return self._generate(self._asks(prompts, params), on_text)

    def infill(
        self,
        gaps: Sequence[tuple[str, str]],
        params: Params | None = None,
        suffix_first: bool = False,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Write what stands between each (prefix, suffix)."""
        if self.tokenizer is not None:
            ids = [self.tokenizer.encode_infilling(p, s, suffix_first) for p, s in gaps]
            asks = self._asks(ids, params, infilling_stop_ids(self.tokenizer), (_EOT_TEXT,))
        elif suffix_first:
            raise ValueError("suffix_first: an endpoint needs the model's tokenizer for it")
        else:
            asks = self._asks([prefix for prefix, _ in gaps], params)
            for ask, (_, suffix) in zip(asks, gaps, strict=True):
                ask.body["suffix"] = suffix
        return self._generate(asks, on_text)

    def chat(
        self,
        dialogs: Sequence[Sequence[Message]],
        params: Params | None = None,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Answer dialogs."""
        tokenizer = self.tokenizer
        if tokenizer is not None and tokenizer.chat_format is not None:
            ids = [tokenizer.encode_dialog(dialog) for dialog in dialogs]
            return self._generate(self._asks(ids, params, chat_stop_ids(tokenizer)), on_text)
        asks = [
            Ask("/chat/completions", {"messages": list(dialog)} | fields_of(p, is_chat=True), p)
            for dialog, p in zip(dialogs, _each(params, len(dialogs)), strict=True)
        ]
        return self._generate(asks, on_text)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt and yield its text as it comes; closing the iterator ends it."""
        for _, piece in self._run(self._asks([prompt], params), streams=True):
            if piece.text:
                yield piece.text

    def score(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Log-probabilities of each text's tokens after the first.

        Raises:
            ValueError: as `complete`, or a server gives no log-probabilities of prompts.
        """
        # One token more, because some servers refuse to write none.
        asks = self._asks(prompts, SamplingParams(1, logprobs=True))
        if any(isinstance(ask.body["prompt"], str) for ask in asks):
            raise ValueError("score: an endpoint needs the model's tokenizer for texts")
        results: list[list[float]] = [[] for _ in asks]
        asked = [number for number, ask in enumerate(asks) if ask.n_prompt > 1]
        for number in asked:
            asks[number].body["echo"] = True
        for place, piece in self._run([asks[number] for number in asked], streams=False):
            if piece.finish_reason is None:
                number = asked[place]
                results[number] = list(piece.logprobs[1 : asks[number].n_prompt])
        for ask, scores in zip(asks, results, strict=True):
            if len(scores) != max(0, ask.n_prompt - 1) or None in scores:
                names = ", ".join(upstream.url for upstream in self._upstreams)
                raise ValueError(f"{names}: gives no log-probabilities of prompts (echo)")
        return results

    async def pieces(
        self, prompt: Sequence[int], params: SamplingParams, stop_ids: Sequence[int]
    ) -> AsyncGenerator[Piece]:
        """As `Engine.pieces`."""
        [ask] = self._asks([prompt], params, stop_ids)
        async with aclosing(self._pieces(ask, streams=True)) as pieces:
            async for piece in pieces:
                yield piece

    def cancel(self) -> None:
        """End all that was asked through this, except `pieces`; callers get what there is."""
        if self._tasks:
            self._cancel(self._tasks)

    async def check(self) -> dict[str, str | None]:
        """Ask every server for its model: what is wrong with each, None where nothing."""

        async def ask(upstream: Upstream) -> None:
            try:
                await upstream.describe(self._client())
                upstream.note(None)
            except (httpx.HTTPError, FailedError, ValueError) as error:
                upstream.note(error)

        await asyncio.gather(*map(ask, self._upstreams))
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

    def _asks(
        self,
        prompts: Sequence[Prompt],
        params: Params | None,
        stop_ids: Sequence[int] = (),
        stop: tuple[str, ...] = (),
    ) -> list[Ask]:
        asks: list[Ask] = []
        for prompt, settings in zip(prompts, _each(params, len(prompts)), strict=True):
            if isinstance(prompt, str) and self.tokenizer is not None:
                prompt = self.tokenizer.encode(prompt, bos=True)
            body = fields_of(settings) | {"prompt": prompt}
            if stop:
                body["stop"] = [*settings.stop, *stop]
            if stop_ids:
                body["stop_token_ids"] = list(stop_ids)
            n_prompt = 0 if isinstance(prompt, str) else len(prompt)
            asks.append(Ask("/completions", body, settings, n_prompt))
        return asks

    def _generate(self, asks: list[Ask], on_text: OnText | None) -> list[Completion]:
        asks = [_numbered(ask, i) for ask in asks for i in range(ask.params.n)]
        parts: list[list[Piece]] = [[] for _ in asks]
        for number, piece in self._run(asks, on_text is not None):
            parts[number].append(piece)
            if on_text and piece.text:
                on_text(number, piece.text)
        return [_joined(pieces, ask) for pieces, ask in zip(parts, asks, strict=True)]

    def _run(self, asks: list[Ask], streams: bool) -> Iterator[tuple[int, Piece]]:
        """The pieces of some texts as they come; closing it ends them."""
        news: SimpleQueue[tuple[int, Piece | BaseException]] = SimpleQueue()
        tasks: set[asyncio.Task[None]] = set()
        running = set(range(len(asks)))

        async def collect(number: int, ask: Ask, limit: asyncio.Semaphore) -> None:
            async with limit, aclosing(self._pieces(ask, streams)) as pieces:
                async for piece in pieces:
                    news.put((number, piece))

        def note_end(number: int, task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                news.put((number, Piece("", (), (), (), "cancelled", 0)))
            elif error := task.exception():
                news.put((number, error))

        async def start() -> None:
            limit = asyncio.Semaphore(self._n_in_flight)
            for number, ask in enumerate(asks):
                task = asyncio.ensure_future(collect(number, ask, limit))
                task.add_done_callback(functools.partial(note_end, number))
                tasks.add(task)
            self._tasks.update(tasks)

        try:
            self._wait(start())
            while running:
                number, item = news.get()
                if number not in running:  # cancelled when it had just ended
                    continue
                if isinstance(item, BaseException):
                    raise item
                if item.finish_reason is not None:
                    running.remove(number)
                yield number, item
        finally:
            self._cancel(tasks)

    async def _pieces(self, ask: Ask, streams: bool) -> AsyncGenerator[Piece]:
        """The pieces of a text from whichever server gives it."""
        if ask.params.max_tokens == 0:  # some servers refuse it, others take it for no limit
            yield Piece("", (), (), (), "length", 0)
            return
        tried: set[Upstream] = set()
        for n_left in reversed(range(self._n_attempts)):
            now = time.monotonic()
            upstream = min(
                self._upstreams, key=lambda u: (u in tried, u.resting_until > now, len(u.busy))
            )
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
                if has_begun or not n_left:
                    reason = str(error) or type(error).__name__
                    raise ConnectionError(f"{upstream.url}{ask.path}: {reason}") from None
            finally:
                upstream.busy.discard(place)

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            limits = httpx.Limits(max_connections=None)
            self._clients[loop] = httpx.AsyncClient(
                headers=self._headers, timeout=self._timeout, limits=limits
            )
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


def _each(params: Params | None, n: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if len(params) != n:
        raise ValueError(f"{len(params)} sampling params for {n} prompts")
    return params


def _numbered(ask: Ask, number: int) -> Ask:
    """The request for one of n texts; each has a seed of its own."""
    if ask.params.seed is None:
        return ask
    return replace(ask, body=ask.body | {"seed": ask.params.seed + number})


def _joined(pieces: list[Piece], ask: Ask) -> Completion:
    params = ask.params
    return Completion(
        "".join(piece.text for piece in pieces),
        tuple(i for piece in pieces for i in piece.token_ids),
        tuple(x for piece in pieces for x in piece.logprobs) if params.logprobs else None,
        pieces[-1].finish_reason or "",
        ask.n_prompt,
        tuple(t for piece in pieces for t in piece.top_logprobs) if params.top_logprobs else None,
    )
