"""The service: runs Requests on an engine, within limits, and counts what happens.

Each text has a task that takes its pieces from the engine as they come, so that a slow reader holds
neither the engine nor a place. Whoever closes the stream ends what is left of it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

from fastapi import Depends
from fastapi import Request as HttpRequest

from codellama.engine import Piece, SamplingParams
from codellama.serve.admission import Admission
from codellama.serve.generation import Edit, Request, Result, edited
from codellama.serve.metrics import Metrics
from codellama.serve.replies import ApiError
from codellama.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Source(Protocol):
    """What the server needs of an Engine or an Endpoint."""

    max_context: int

    @property
    def failure(self) -> str | None:
        """Why nothing can run any more."""
        ...

    def pieces(
        self, prompt: Sequence[int], params: SamplingParams, stop_ids: Sequence[int]
    ) -> AsyncIterator[Piece]:
        """Continue ids."""
        ...

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of all tokens but the first."""
        ...

    def cancel(self) -> None:
        """End everything."""
        ...


@dataclass(frozen=True)
class Limits:
    """What one server, and one request, may take."""

    max_texts: int = 128
    """Texts under way, running or waiting; more are refused with 429."""
    max_total_tokens: int = 1 << 20
    """Of all texts under way, prompts and what they may become."""
    max_new_tokens: int = 1 << 16
    """Of one text."""
    max_body_bytes: int = 4 << 20
    timeout_s: float = 600.0
    newest_wins: bool = False
    """Whether a client's infilling ends where it asks for another."""


@dataclass(frozen=True)
class ModelCard:
    """What the server says about its model."""

    name: str
    created: int
    meta: dict[str, Any]
    """llama.cpp's names: n_vocab, n_ctx_train, n_embd, n_params, size (bytes)."""


Stream = AsyncGenerator[tuple[int, Piece, Result]]
"""Number of the text, its next piece, and all of it so far."""


class Service:
    """One engine with its tokenizer, limits and counters."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        card: ModelCard,
        limits: Limits,
        recognise: bool = True,
        suffix_first: bool = False,
    ) -> None:
        self.source, self.tokenizer, self.card, self.limits = source, tokenizer, card, limits
        self.recognise, self.suffix_first = recognise, suffix_first
        self.max_context = source.max_context
        self.admission = Admission(limits.max_texts, limits.max_total_tokens)
        self.metrics = Metrics()
        self._scoring = asyncio.Lock()

    async def stream(self, request: Request, client: str | None = None) -> Stream:
        """Every piece of every text of a request, in the order of their coming.

        Texts are numbered prompt by prompt. Closing the stream ends them all.

        Raises:
            ApiError: refused, timed out, replaced by a newer request, or failed.
        """
        jobs = self._jobs(request)
        n_tokens = sum(
            min(len(prompt.ids) + params.max_tokens, self.max_context) for prompt, params in jobs
        )
        news: asyncio.Queue[tuple[int, Piece, Result] | ApiError] = asyncio.Queue()
        if not (self.limits.newest_wins and request.is_infilling):
            client = None
        leave = self.admission.enter(len(jobs), n_tokens, client, news.put_nowait)
        tasks = [
            asyncio.ensure_future(self._write(number, prompt, params, request.edit, news))
            for number, (prompt, params) in enumerate(jobs)
        ]
        everything = asyncio.gather(*tasks, return_exceptions=True)
        everything.add_done_callback(lambda _: leave())
        late = ApiError(504, f"not finished within {self.limits.timeout_s:g} s", "timeout_error")
        timer = asyncio.get_running_loop().call_later(self.limits.timeout_s, news.put_nowait, late)
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
                everything.cancel()

    async def results(self, request: Request, client: str | None = None) -> list[Result]:
        """All texts of a request once they are whole, the best n of each prompt.

        Raises:
            ApiError: as `stream`.
        """
        async with aclosing(self.stream(request, client)) as stream:
            found = {number: result async for number, _, result in stream}
        results = [found[number] for number in sorted(found)]
        if request.best_of <= request.n:
            return results
        groups = [
            results[at : at + request.best_of] for at in range(0, len(results), request.best_of)
        ]
        return [
            result
            for group in groups
            for result in sorted(group, key=_mean_logprob, reverse=True)[: request.n]
        ]

    async def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of a prompt's tokens after the first; one prompt at a time."""
        async with self._scoring:
            return (await asyncio.to_thread(self.source.score, [ids]))[0]

    def _jobs(self, request: Request) -> list[tuple[Any, SamplingParams]]:
        """(prompt, params) of each text; the i-th of a prompt has the seed + i."""
        params, most = request.params, self.limits.max_new_tokens
        # No more than fits, said or not; a wish beyond a limit of the operator is refused.
        if params.max_tokens > most and self.max_context > most:
            raise ApiError(400, f"max_tokens = {params.max_tokens}: expected at most {most}")
        count = max(request.n, request.best_of)
        jobs = []
        for prompt in request.prompts:
            if len(prompt.ids) > self.max_context:
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt.ids)} tokens, the model's context "
                    f"{self.max_context}",
                    code="context_length_exceeded",
                )
            for i in range(count):
                seed = None if params.seed is None else params.seed + i
                jobs.append((prompt, replace(params, seed=seed)))
        return jobs

    async def _write(
        self,
        number: int,
        prompt: Any,
        params: SamplingParams,
        edit: Edit,
        news: asyncio.Queue[tuple[int, Piece, Result] | ApiError],
    ) -> None:
        """Bring the pieces of one text into the queue."""
        metrics, result = self.metrics, Result(prompt)
        metrics.prompt_tokens.inc(len(prompt.ids))
        gauge = metrics.waiting
        gauge.inc()
        try:
            pieces = self.source.pieces(prompt.ids, params, prompt.stop_ids)
            if edit != Edit():
                pieces = edited(pieces, edit, prompt.suffix)
            async with aclosing(pieces) as stream:  # pyright: ignore[reportArgumentType]
                async for piece in stream:
                    result.add(piece)
                    if gauge is metrics.waiting:
                        gauge.dec()
                        gauge = metrics.running
                        gauge.inc()
                        metrics.first_token.observe(result.first_s)
                        metrics.cached_tokens.inc(piece.n_cached)
                    metrics.tokens.inc(len(piece.token_ids))
                    news.put_nowait((number, piece, result))
            if len(result.token_ids) > 1 and result.total_s > result.first_s:
                metrics.rate.observe(
                    (len(result.token_ids) - 1) / (result.total_s - result.first_s)
                )
        except Exception as error:  # noqa: BLE001  whatever it is, the client must hear of it
            if isinstance(error, ValueError) and params.schema is not None and not result.text:
                news.put_nowait(ApiError(400, str(error), param="response_format"))
            else:
                news.put_nowait(failed(error))
        finally:
            gauge.dec()


def _running(http: HttpRequest) -> Service:
    """The service of an app, once its model is there.

    Raises:
        ApiError: it is not, or no longer.
    """
    service: Service | None = http.app.state.service
    if service is None:
        raise ApiError(503, "Loading model", headers={"retry-after": "1"})
    if service.source.failure is not None:
        raise ApiError(503, "the engine has stopped")
    return service


def _client(http: HttpRequest) -> str:
    """Who asks, as far as one can tell editors apart."""
    names = ("authorization", "user-agent")
    host = http.client.host if http.client else ""
    return "\n".join([host, *(http.headers.get(name, "") for name in names)])


Running = Annotated[Service, Depends(_running)]
Client = Annotated[str, Depends(_client)]


def failed(error: Exception) -> ApiError:
    """What a client hears of an error of ours: a number that stands in the log, too.

    The log has where it happened, not the message, which may hold what a client wrote.
    """
    number = secrets.token_hex(6)
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("error %s: %s\n%s", number, type(error).__name__, where)
    return ApiError(500, f"the server failed; error {number} in its log")


def _mean_logprob(result: Result) -> float:
    return sum(result.logprobs) / max(1, len(result.logprobs))
