"""The service: runs Requests on an engine or a cluster, within limits, and counts what happens.

Each text has a task that takes its pieces from the engine as they come, so that a slow reader holds
neither the engine nor a place. Whoever closes the stream ends what is left of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from fastapi import Request as HttpRequest

from codellama.engine import Engine, Piece, SamplingParams
from codellama.engine.batcher import where
from codellama.engine.endpoint import Endpoint
from codellama.engine.grammar import matcher_of
from codellama.engine.runner import Chosen
from codellama.engine.upstream import FailedError
from codellama.serve import prompts
from codellama.serve.bodies import ChatMessage
from codellama.serve.generation import Edit, Request, Result, edited
from codellama.serve.metrics import Metrics
from codellama.serve.prompts import Prompt
from codellama.serve.replies import ApiError
from codellama.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
Stream = AsyncGenerator[tuple[int, Piece, Result]]
"""Number of the text, its next piece, and all of it so far."""
News = asyncio.Queue[tuple[int, Piece, Result] | ApiError]
Job = tuple[Prompt, SamplingParams]
T = TypeVar("T")
arrived: ContextVar[Callable[[], object]] = ContextVar("arrived", default=lambda: None)
"""To be called once a request is admitted or refused."""
is_long: ContextVar[bool] = ContextVar("is_long", default=False)
"""Whether a request has so much text that encoding it would hold up others."""


@dataclass(frozen=True)
class Limits:
    """What may be under way, and how requests are understood."""

    max_texts: int = 128
    """Running or waiting; more are refused."""
    max_total_tokens: int = 1 << 20
    """Of all these texts, prompts and what they may become."""
    max_new_tokens: int = 1 << 16
    """Of one text."""
    timeout_s: float = 600.0
    newest_wins: bool = False
    """Whether a client's infilling ends where it asks for another."""
    recognise: bool = True
    """Whether prompts in the written form of infilling are taken for it."""
    suffix_first: bool = False
    """SPM where a client does not say."""
    trim_suffix: bool = False
    end_at_line: bool = False
    """Whether infilling ends as in `Edit`, also where a client does not ask for it."""


class Service:
    """One model with its limits and counters.

    Args:
        meta: what llama.cpp's clients want to know of it: n_vocab, n_ctx_train, n_embd, n_params,
            size (bytes); and its precision.
    """

    def __init__(
        self,
        source: Engine | Endpoint,
        tokenizer: Tokenizer,
        name: str,
        meta: dict[str, Any],
        limits: Limits = Limits(),
    ) -> None:
        self.source, self.tokenizer, self.name = source, tokenizer, name
        self.meta, self.limits = meta, limits
        self.max_context, self.created = source.max_context, int(time.time())
        self.metrics = Metrics()
        if isinstance(source, Engine):
            self.metrics.cache_use.set_function(lambda: source.cache_use)
        self.n_texts = self.n_tokens = 0
        self._under_way: dict[News, str | None] = {}
        self._scoring = asyncio.Lock()

    @property
    def most_tokens(self) -> int:
        """What a text may have where its client does not say."""
        return min(self.max_context, self.limits.max_new_tokens)

    @property
    def n_left(self) -> int:
        """Texts that may still begin."""
        return self.limits.max_texts - self.n_texts

    @property
    def capabilities(self) -> list[str]:
        """In Ollama's words."""
        known = ["completion"] + ["insert"] * self.tokenizer.supports_infilling
        return known + ["chat"] * (self.tokenizer.chat_format is not None)

    async def completion(self, text: str | Sequence[int]) -> Prompt:
        """As `prompts.completion`."""
        return await beside(prompts.completion, self.tokenizer, text, self.limits.recognise)

    async def dialog(self, messages: Sequence[ChatMessage]) -> Prompt:
        """As `prompts.dialog`."""
        return await beside(prompts.dialog, self.tokenizer, [m.plain() for m in messages])

    async def gap(
        self,
        prefix: str,
        suffix: str,
        suffix_first: bool | None = None,
        files: Sequence[tuple[str, str]] = (),
        n_tokens: int | None = None,
    ) -> Prompt:
        """The prompt of an infilling, cut so that n_tokens have room where they are given.

        Raises:
            ApiError: the model cannot infill.
        """
        if not self.tokenizer.supports_infilling:
            message = f"{self.name} does not support insert: it was not trained to infill"
            raise ApiError(501 if n_tokens else 400, message, "suffix", "fim_not_supported")
        spm = self.limits.suffix_first if suffix_first is None else suffix_first
        room = self.max_context - min(n_tokens, self.max_context // 4) if n_tokens else None
        return await beside(prompts.infilling, self.tokenizer, prefix, suffix, spm, files, room)

    async def stream(
        self, request: Request, client: str | None = None, whole: bool = False
    ) -> Stream:
        """Every piece of every text of a request, as they come; texts count prompt by prompt.

        Where `whole`, each text comes in two pieces, which costs the event loop less.

        Raises:
            ApiError: refused, too late, replaced by a newer request of this client, or failed.
        """
        jobs = await self._jobs(request)
        edit, limits, news = request.edit, self.limits, News()
        is_infilling = any(prompt.is_infilling for prompt in request.prompts)
        if is_infilling:
            trims = edit.trim_suffix or limits.trim_suffix
            ends = edit.whole_lines or limits.end_at_line
            edit = replace(edit, trim_suffix=trims, whole_lines=ends)
        leave = self._enter(jobs, news, client if limits.newest_wins and is_infilling else None)
        scores: dict[Prompt, Chosen] = {}

        async def write(number: int, prompt: Prompt, params: SamplingParams) -> None:
            result, stops = Result(prompt), prompt.stop_ids
            with self.metrics.text(result):
                try:
                    if request.n_scored is not None:
                        result.scores = await self._score(prompt, request.n_scored, scores)
                    is_whole = whole and edit == Edit()
                    pieces: Any = self.source.pieces(prompt.ids, params, stops, is_whole)
                    if edit != Edit():
                        pieces = edited(pieces, edit, prompt.suffix)
                    async with aclosing(pieces) as stream:
                        async for piece in stream:
                            result.add(piece)
                            news.put_nowait((number, piece, result))
                except Exception as error:  # noqa: BLE001  its client must hear of it, whatever it is
                    is_far = isinstance(self.source, Endpoint)
                    news.put_nowait(_failed_there(error) if is_far else failed(error))

        tasks = [asyncio.ensure_future(write(number, *job)) for number, job in enumerate(jobs)]
        for task in tasks:
            task.add_done_callback(leave)
        late = ApiError(504, f"not finished within {limits.timeout_s:g} s")
        timer = asyncio.get_running_loop().call_later(limits.timeout_s, news.put_nowait, late)
        n_left = len(tasks)
        try:
            while n_left:
                item = await news.get()
                if isinstance(item, ApiError):
                    raise item
                n_left -= item[1].finish_reason is not None
                yield item
        finally:
            timer.cancel()
            if n_left:
                self.metrics.cancelled.inc()
                for task in tasks:
                    task.cancel()

    async def results(self, request: Request, client: str | None = None) -> list[Result]:
        """As `stream`, all texts of a request once they are whole, the best n of each prompt."""
        async with aclosing(self.stream(request, client, whole=True)) as stream:
            found = {number: result async for number, _, result in stream}
        best: list[Result] = []
        for start in range(0, len(found), request.n_tried):
            group = [found[start + i] for i in range(request.n_tried)]
            if request.n_tried > request.n:
                group.sort(key=lambda r: sum(r.logprobs) / max(1, len(r.logprobs)), reverse=True)
            best += group[: request.n]
        return best

    async def _score(self, prompt: Prompt, n_top: int, known: dict[Prompt, Chosen]) -> Chosen:
        """As `Engine.rank`, one prompt at a time, each once; a cluster ranks no other tokens."""

        def rank() -> Chosen:
            if isinstance(self.source, Engine):
                return self.source.rank(prompt.ids, n_top)
            [found] = self.source.score([prompt.ids])
            return [(token, p, ()) for token, p in zip(prompt.ids[1:], found, strict=True)]

        async with self._scoring:
            if prompt not in known:
                work = asyncio.ensure_future(asyncio.to_thread(rank))
                try:
                    known[prompt] = await asyncio.shield(work)
                finally:  # who leaves has a place until the thread ends, which nothing can cut off
                    await asyncio.wait({work})
            return known[prompt]

    def end(self, error: ApiError, client: str | None = None) -> None:
        """End what is under way, of one client or of all."""
        for news, owner in list(self._under_way.items()):
            if client in (None, owner):
                news.put_nowait(error)

    async def _jobs(self, request: Request) -> list[Job]:
        """Each text's prompt and params; the i-th of a prompt has the seed + i."""
        params, most = request.params, self.limits.max_new_tokens
        if params.max_tokens > most < self.max_context:
            raise ApiError(400, f"max_tokens = {params.max_tokens}: expected at most {most}")
        n_ids = self.tokenizer.vocab_size
        if wrong := [token for token, _ in params.logit_bias if token >= n_ids]:
            raise ApiError(400, f"logit_bias of {wrong[0]}: expected token ids in [0, {n_ids})")
        if params.has_grammar:  # compiled once, not in the event loop
            await asyncio.to_thread(matcher_of, self.tokenizer, params)
        for prompt in request.prompts:
            if (n := len(prompt.ids)) > self.max_context:
                message = f"the prompt has {n} tokens, the model's context {self.max_context}"
                raise ApiError(400, message, code="context_length_exceeded")
        seeds = [None if params.seed is None else params.seed + i for i in range(request.n_tried)]
        return [(p, replace(params, seed=seed)) for p in request.prompts for seed in seeds]

    def _enter(self, jobs: list[Job], news: News, client: str | None) -> Callable[[object], None]:
        """Count a request in; what is returned counts a text of it out."""
        limits = self.limits
        tokens = [min(len(p.ids) + params.max_tokens, self.max_context) for p, params in jobs]
        n_texts, n_tokens = len(jobs), sum(tokens)
        if n_texts > limits.max_texts or n_tokens > limits.max_total_tokens:
            raise ApiError(
                400,
                f"{n_texts} texts of {n_tokens} tokens in one request: expected at most "
                f"{limits.max_texts} texts of {limits.max_total_tokens} tokens in all",
            )
        if client is not None:
            self.end(ApiError(409, "a newer request of this client took its place"), client)
        if n_texts > self.n_left or self.n_tokens + n_tokens > limits.max_total_tokens:
            raise busy()
        self.n_texts += n_texts
        self.n_tokens += n_tokens
        self._under_way[news] = client
        arrived.get()()

        def leave(task: object) -> None:
            self.n_texts -= 1
            self.n_tokens -= tokens.pop()
            if not tokens:
                del self._under_way[news]

        return leave


async def beside(build: Callable[..., T], *args: Any) -> T:
    """What is built of a request's texts; beside the event loop where they are long."""
    return await asyncio.to_thread(build, *args) if is_long.get() else build(*args)


def busy(wait_s: float = 1.0) -> ApiError:
    """The refusal because of the load."""
    wait = {"retry-after": str(max(1, math.ceil(wait_s)))}
    return ApiError(429, "the server is busy; try again", headers=wait)


def _failed_there(error: Exception) -> ApiError:
    """What a client hears of a cluster, whose addresses and words are not for it."""
    if isinstance(error, FailedError):
        return busy(error.wait_s)
    if isinstance(error, ConnectionError):
        return ApiError(503, "the cluster does not answer", headers={"retry-after": "1"})
    is_refused = isinstance(error, ValueError)
    return ApiError(400, "the cluster refuses this request") if is_refused else failed(error)


def failed(error: Exception) -> ApiError:
    """What a client hears of an error of ours: a number that stands in the log, too."""
    number = secrets.token_hex(6)
    _log.error("error %s: %s", number, where(error))
    return ApiError(500, f"the server failed; error {number} in its log")


async def ready(http: HttpRequest) -> Service:
    """The service of an app; an ApiError while its model is not there yet, or no longer."""
    service: Service | None = http.app.state.service
    wait = {"retry-after": "1"}
    if service is None:
        raise ApiError(503, "Loading model", headers=wait)
    if service.source.failure is not None:
        raise ApiError(503, "the model cannot be reached or has stopped", headers=wait)
    return service


async def _client(http: HttpRequest) -> str:
    """Who asks, as far as editors can be told apart."""
    host = http.client.host if http.client else ""
    return "\n".join([host, *(http.headers.get(n, "") for n in ("authorization", "user-agent"))])


Ready = Annotated[Service, Depends(ready)]
Client = Annotated[str, Depends(_client)]
