"""OpenAI's dialect: completions with a suffix, chat, models; and Mistral's fim/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Discriminator, Tag

from codellama.engine import Piece
from codellama.serve import prompts, tabby
from codellama.serve.generation import Request, Result
from codellama.serve.openai_bodies import ChatBody, CompletionBody, FimBody, Sampling
from codellama.serve.replies import ApiError, as_events, as_json, user_mistakes
from codellama.serve.service import Client, Running, Service, Stream
from codellama.tokenizer import Tokenizer

router = APIRouter()
SPOKEN = {"stop": "stop", "length": "length", "cancelled": "length"}


def _dialect(body: Any) -> str:
    is_tabby = isinstance(body, dict) and "segments" in body
    return "tabby" if is_tabby or isinstance(body, tabby.Body) else "openai"


CompletionOrTabby = Annotated[
    Annotated[CompletionBody, Tag("openai")] | Annotated[tabby.Body, Tag("tabby")],
    Discriminator(_dialect),
]


@router.post("/v1/completions")
async def completions(body: CompletionOrTabby, service: Running, client: Client) -> Response:
    """Continue a prompt, or fill the gap before a suffix. With `segments`: Tabby's dialect."""
    if isinstance(body, tabby.Body):
        return await tabby.complete(body, service, client)
    with user_mistakes():
        texts = _listed(body.prompt)
        many = [_prompt(text, body, service) for text in texts]
        params = body.params(
            service,
            16,
            logprobs=body.logprobs is not None or (body.best_of or 1) > 1,
            top_logprobs=body.logprobs or 0,
        )
    n = body.n or 1
    if (body.best_of or n) < n or (body.stream and (body.best_of or n) > n):
        expected = f"n = {n} in a stream" if body.stream else f"at least n = {n}"
        raise ApiError(400, f"best_of = {body.best_of}: expected {expected}", param="best_of")
    is_infilling = body.suffix is not None
    request = Request(tuple(many), params, n, body.best_of or n, body.edit, is_infilling)
    reply = _Completions(service, body, request, texts)
    if body.stream:
        return await as_events(reply.chunks(service.stream(request, client)))
    results = await service.results(request, client)
    choices = [await reply.choice(number, result, 0) for number, result in enumerate(results)]
    return as_json(reply.head("text_completion", choices, reply.usage(results)))


@router.post("/v1/fim/completions")
async def fim_completions(body: FimBody, service: Running, client: Client) -> Response:
    """Fill the gap between prompt and suffix; the reply is shaped like chat."""
    with user_mistakes():
        prompt = infilling_prompt(service, body.prompt, body.suffix or "", body.suffix_first)
        params = body.params(service, service.max_context, seed=body.random_seed or body.seed)
    request = Request((prompt,), params, body.n or 1, edit=body.edit, is_infilling=True)
    return await _chat_reply(_Chat(service, body, request, is_fim=True), client)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, service: Running, client: Client) -> Response:
    """Answer a dialog."""
    for name in ("tools", "functions"):
        if getattr(body, name):
            raise ApiError(400, f"{name}: the models served here call none", param=name)
    with user_mistakes():
        prompt = prompts.dialog(service.tokenizer, [m.plain() for m in body.messages])
        params = body.params(
            service,
            service.max_context,
            logprobs=bool(body.logprobs),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
            schema=body.response_format and body.response_format.schema_text(),
        )
    request = Request((prompt,), params, body.n or 1)
    return await _chat_reply(_Chat(service, body, request), client)


@router.get("/v1/models")
async def models(service: Running) -> Response:
    """The one model that is served."""
    card, tokenizer = service.card, service.tokenizer
    capabilities = ["completion"] + ["insert"] * tokenizer.supports_infilling
    entry = {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "codellama",
        "max_model_len": service.max_context,
        "capabilities": capabilities + ["chat"] * (tokenizer.chat_format is not None),
        "meta": card.meta,
    }
    return as_json({"object": "list", "data": [entry]})


def infilling_prompt(
    service: Service, prefix: str, suffix: str, suffix_first: bool | None = None
) -> prompts.Prompt:
    """The gap between two texts.

    Raises:
        ApiError: the model cannot infill.
    """
    tokenizer = service.tokenizer
    if not tokenizer.supports_infilling:
        message = f"{service.card.name} was not trained to infill"
        raise ApiError(400, message, param="suffix", code="fim_not_supported")
    if suffix_first is None:
        suffix_first = service.suffix_first
    return prompts.infilling(tokenizer, prefix, suffix, suffix_first)


def _listed(prompt: Any) -> list[Any]:
    """The prompts of a batch."""
    is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    found = [prompt] if is_one else list(prompt)
    if not found:
        raise ValueError("prompt is an empty list: expected at least one")
    return found


def _prompt(text: str | list[int], body: CompletionBody, service: Service) -> prompts.Prompt:
    if body.suffix is None:
        return prompts.completion(service.tokenizer, text, service.recognise)
    if not isinstance(text, str):
        text = service.tokenizer.decode(text)
    return infilling_prompt(service, text, body.suffix, body.suffix_first)


class _Reply:
    """What is the same in all parts of a reply."""

    def __init__(self, service: Service, body: Sampling, request: Request, kind: str) -> None:
        self.service, self.body, self.request = service, body, request
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        options = body.stream_options
        self.with_usage = bool(body.stream and options and options.include_usage)

    def head(
        self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A reply or a chunk of one."""
        known = {"id": self.id, "object": kind, "created": self.created}
        known |= {"model": self.service.card.name, "choices": choices}
        return known if usage is None else known | {"usage": usage}

    def usage(self, results: Iterable[Result]) -> dict[str, Any]:
        """Tokens of the prompts, each once, and of all texts."""
        results = list(results)
        n_prompt = sum(len(prompt.ids) for prompt in self.request.prompts)
        n_new = sum(len(result.token_ids) for result in results)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {
                "cached_tokens": sum(r.n_cached for r in results[:: self.request.n])
            },
        }

    def ids(self, number: int, part: Piece | Result, is_first: bool) -> dict[str, Any]:
        """The ids that a choice carries where the client wants them."""
        if not self.body.return_token_ids:
            return {}
        prompt = self.request.prompts[number // self.request.n]
        known = {"prompt_token_ids": prompt.ids} if is_first else {}
        return known | {"token_ids": part.token_ids}


class _Completions(_Reply):
    """Replies of /v1/completions."""

    def __init__(
        self, service: Service, body: CompletionBody, request: Request, texts: Sequence[Any]
    ) -> None:
        super().__init__(service, body, request, "cmpl")
        tokenizer = service.tokenizer
        self.echoes = [t if isinstance(t, str) else tokenizer.decode(t) for t in texts]
        self.echo, self.n_logprobs = bool(body.echo), body.logprobs

    async def choice(self, number: int, part: Piece | Result, n_chars: int) -> dict[str, Any]:
        """A text, or a piece of it that stands behind so many characters."""
        text, ids, logprobs = part.text, list(part.token_ids), list[float | None](part.logprobs)
        tops: list[Any] = list(part.top_logprobs)
        which = number // self.request.n
        if self.echo and n_chars == 0:
            text = self.echoes[which] + text
            if self.n_logprobs is not None:
                prompt = self.request.prompts[which].ids
                scores = await self.service.score(prompt) if len(prompt) > 1 else []
                ids, logprobs = [*prompt, *ids], [None, *scores, *logprobs]
                tops = [*[None] * len(prompt), *tops]
        shown = None
        if self.n_logprobs is not None:
            tokens = [token_text(self.service.tokenizer, i) for i in ids]
            shown = {
                "tokens": tokens,
                "token_logprobs": [None if p is None else _finite(p) for p in logprobs],
                "top_logprobs": [self._top(top) for top in tops] if self.n_logprobs else None,
                "text_offset": list(accumulate(map(len, tokens), initial=n_chars))[:-1],
            }
        known = {"index": number, "text": text, "logprobs": shown}
        known["finish_reason"] = part.finish_reason and SPOKEN[part.finish_reason]
        return known | self.ids(number, part, n_chars == 0)

    async def chunks(self, stream: Stream) -> AsyncGenerator[dict[str, Any]]:
        """The pieces of all texts, then the usage."""
        results: dict[int, Result] = {}
        n_chars: dict[int, int] = {}
        async with aclosing(stream) as pieces:
            async for number, piece, result in pieces:
                results[number] = result
                choice = await self.choice(number, piece, n_chars.get(number, 0))
                n_chars[number] = n_chars.get(number, 0) + max(1, len(choice["text"]))
                yield self.head("text_completion", [choice])
        if self.with_usage:
            yield self.head("text_completion", [], self.usage(results.values()))

    def _top(self, top: Any) -> dict[str, float] | None:
        tokenizer = self.service.tokenizer
        return top and {token_text(tokenizer, i): _finite(p) for i, p in top}


class _Chat(_Reply):
    """Replies of /v1/chat/completions, and Mistral's, whose texts are never absent."""

    def __init__(
        self, service: Service, body: Sampling, request: Request, is_fim: bool = False
    ) -> None:
        super().__init__(service, body, request, "fim" if is_fim else "chatcmpl")
        self.is_fim = is_fim

    def choice(
        self, number: int, part: Piece | Result, message: dict[str, Any], is_first: bool = True
    ) -> dict[str, Any]:
        """A message, or what it grew by."""
        shown = {"content": self._logprobs(part)} if self.request.params.logprobs else None
        known = {"index": number, **message, "logprobs": shown}
        known["finish_reason"] = part.finish_reason and SPOKEN[part.finish_reason]
        return known | self.ids(number, part, is_first)

    async def chunks(self, stream: Stream) -> AsyncGenerator[dict[str, Any]]:
        """A first chunk with the role for each text, its pieces, then the usage."""
        results: dict[int, Result] = {}
        kind = "chat.completion.chunk"
        async with aclosing(stream) as pieces:
            async for number, piece, result in pieces:
                is_first = number not in results
                results[number] = result
                if is_first:
                    role = {"role": "assistant", "content": ""}
                    opening = {"index": number, "delta": role, "finish_reason": None}
                    yield self.head(kind, [opening])
                delta = {"content": piece.text}
                if piece.finish_reason and not piece.token_ids and not self.is_fim:
                    delta = {"content": piece.text} if piece.text else {}
                yield self.head(kind, [self.choice(number, piece, {"delta": delta}, is_first)])
        if self.with_usage:
            yield self.head(kind, [], self.usage(results.values()))

    def _logprobs(self, part: Piece | Result) -> list[dict[str, Any]]:
        """One entry for each token, with the likeliest ones where asked for."""
        tops = part.top_logprobs or [()] * len(part.token_ids)
        return [
            self._token(i, p) | {"top_logprobs": [self._token(*other) for other in top]}
            for i, p, top in zip(part.token_ids, part.logprobs, tops, strict=False)
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.service.tokenizer.token_bytes(token)
        text = token_text(self.service.tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


async def _chat_reply(reply: _Chat, client: str) -> Response:
    service, request = reply.service, reply.request
    if reply.body.stream:
        return await as_events(reply.chunks(service.stream(request, client)))
    results = await service.results(request, client)
    choices = [
        reply.choice(n, r, {"message": {"role": "assistant", "content": r.text}})
        for n, r in enumerate(results)
    ]
    return as_json(reply.head("chat.completion", choices, reply.usage(results)))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token alone; what is no whole character is replaced."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; OpenAI's interface says it like this
