"""OpenAI's dialect: completions with a suffix, chat, models; and Mistral's fim/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Discriminator, Field, Tag

from codellama.engine import Piece, SamplingParams
from codellama.engine.runner import Chosen
from codellama.serve import tabby
from codellama.serve.bodies import Body, ChatMessage, Factor, N, ResponseFormat, Sampling, Whole
from codellama.serve.generation import Edit, Request, Result
from codellama.serve.prompts import Prompt
from codellama.serve.replies import ApiError, as_events, as_json
from codellama.serve.service import Client, Ready, Service, Stream
from codellama.tokenizer import StreamDecoder, Tokenizer

router = APIRouter()
_SPOKEN = {None: None, "stop": "stop", "length": "length", "cancelled": "length"}
_Text = str | list[str] | Annotated[list[Whole], Field(min_length=1)] | list[list[Whole]]


class _StreamOptions(Body):
    include_usage: bool | None = None


class _Asked(Sampling):
    """Fields of OpenAI's bodies, vLLM's extensions, and ours."""

    max_tokens: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    n: N | None = None
    logit_bias: dict[str, float] | None = None
    repetition_penalty: Factor | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop_token_ids: list[Whole] | None = None
    return_token_ids: bool | None = None
    suffix_first: bool | None = None
    trim_suffix: bool = False
    end_at_line: bool = False
    """These three are ours: SPM instead of PSM, and how a text ends, as in `Edit`."""

    def settings(self, default_tokens: int, **more: Any) -> SamplingParams:
        """What the engine is asked for."""
        if wrong := [key for key in self.logit_bias or {} if not key.isdecimal()]:
            raise ValueError(f"logit_bias of {wrong[0]!r}: expected token ids")
        return self.params(
            max_tokens=default_tokens if self.max_tokens is None else self.max_tokens,
            temperature=1.0,
            logit_bias=tuple((int(key), value) for key, value in (self.logit_bias or {}).items()),
            repetition_penalty=self.repetition_penalty,
            schema=self.response_format and self.response_format.schema_text(),
            **more,
        )

    def request(self, found: Sequence[Prompt], params: SamplingParams, **more: Any) -> Request:
        """For all prompts."""
        stops = tuple(self.stop_token_ids or ())
        found = [replace(prompt, stop_ids=prompt.stop_ids + stops) for prompt in found]
        edit = Edit(trim_suffix=self.trim_suffix, whole_lines=self.end_at_line)
        return Request(tuple(found), params, self.n or 1, edit=edit, **more)


class CompletionBody(_Asked):
    """/v1/completions. A suffix, even an empty one, asks for what stands before it."""

    prompt: _Text
    suffix: str | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: N | None = None


class FimBody(_Asked):
    """/v1/fim/completions, Mistral's shape."""

    prompt: str
    suffix: str | None = None
    random_seed: Whole | None = None


class ChatBody(_Asked):
    """/v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None


def _dialect(body: Any) -> str:
    is_tabby = isinstance(body, tabby.Body) or (isinstance(body, dict) and "segments" in body)
    return "tabby" if is_tabby else "openai"


CompletionOrTabby = Annotated[
    Annotated[CompletionBody, Tag("openai")] | Annotated[tabby.Body, Tag("tabby")],
    Discriminator(_dialect),
]


@router.post("/v1/completions")
async def completions(body: CompletionOrTabby, service: Ready, client: Client) -> Response:
    """Continue a prompt, or fill the gap before a suffix. With `segments`: Tabby's dialect."""
    if isinstance(body, tabby.Body):
        return await tabby.complete(body, service, client)
    is_one = isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int))
    texts: list[Any] = [body.prompt] if is_one else list(body.prompt)
    if not texts:
        raise ValueError("prompt is an empty list: expected at least one")
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n or (body.stream and best_of > n):
        expected = f"n = {n} in a stream" if body.stream else f"at least n = {n}"
        raise ApiError(400, f"best_of = {best_of}: expected {expected}", "best_of")
    wants_logprobs = body.logprobs is not None or best_of > n
    params = body.settings(16, logprobs=wants_logprobs, top_logprobs=body.logprobs)
    if body.suffix is None:
        found = [await service.completion(text) for text in texts]
    else:
        before = [t if isinstance(t, str) else service.tokenizer.decode(t) for t in texts]
        found = [await service.gap(t, body.suffix, body.suffix_first) for t in before]
    n_scored = body.logprobs if body.echo else None
    request = body.request(found, params, best_of=best_of, n_scored=n_scored)
    return await _Reply("text_completion", service, body, request, texts).send(client)


@router.post("/v1/fim/completions")
async def fim_completions(body: FimBody, service: Ready, client: Client) -> Response:
    """Fill the gap between prompt and suffix; the reply is shaped like chat."""
    params = body.settings(service.most_tokens, seed=body.random_seed)
    gap = await service.gap(body.prompt, body.suffix or "", body.suffix_first)
    request = body.request([gap], params)
    return await _Reply("chat.completion", service, body, request).send(client)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, service: Ready, client: Client) -> Response:
    """Answer a dialog."""
    if body.tools:
        raise ApiError(400, "tools: the models served here call none", "tools")
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    tops = body.top_logprobs if body.logprobs else None
    params = body.settings(service.most_tokens, logprobs=body.logprobs, top_logprobs=tops)
    request = body.request([await service.dialog(body.messages)], params)
    return await _Reply("chat.completion", service, body, request).send(client)


@router.get("/v1/models")
async def models(service: Ready) -> Response:
    """The one model that is served."""
    entry = {"id": service.name, "object": "model", "created": service.created}
    entry |= {"owned_by": "codellama", "max_model_len": service.max_context}
    entry |= {"capabilities": service.capabilities, "meta": service.meta}
    return as_json({"object": "list", "data": [entry]})


class _Reply:
    """One reply, whole or as a stream; `kind` is the name of its shape."""

    def __init__(
        self, kind: str, service: Service, body: Any, request: Request, texts: Sequence[Any] = ()
    ) -> None:
        self.kind, self.service, self.body, self.request = kind, service, body, request
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.is_chat = kind == "chat.completion"
        is_echo = not self.is_chat and body.echo
        decode = service.tokenizer.decode
        self.echoes = [t if isinstance(t, str) else decode(t) for t in texts] if is_echo else None

    async def send(self, client: str) -> Response:
        """Run the request and reply."""
        if self.body.stream:
            return await as_events(self.chunks(self.service.stream(self.request, client)))
        results = await self.service.results(self.request, client)
        choices = [self.choice(n, result, result) for n, result in enumerate(results)]
        return as_json(self.head(self.kind, choices) | {"usage": self.usage(results)})

    async def chunks(self, stream: Stream) -> AsyncGenerator[dict[str, Any]]:
        """The pieces of all texts, then the usage where the client wants it."""
        results: dict[int, Result] = {}
        n_chars: dict[int, int] = {}
        kind = self.kind + ".chunk" * self.is_chat
        async with aclosing(stream) as pieces:
            async for number, piece, result in pieces:
                if self.is_chat and number not in results:
                    opening = {"index": number, "delta": {"role": "assistant", "content": ""}}
                    yield self.head(kind, [opening | {"logprobs": None, "finish_reason": None}])
                choice = self.choice(number, piece, result, n_chars.get(number))
                n_chars[number] = n_chars.get(number, 0) + len(choice.get("text", ""))
                results[number] = result
                yield self.head(kind, [choice])
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self.head(kind, []) | {"usage": self.usage(results.values())}

    def head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What is the same in all parts of a reply."""
        known = {"id": self.id, "object": kind, "created": self.created}
        return known | {"model": self.service.name, "choices": choices}

    def usage(self, results: Iterable[Result]) -> dict[str, Any]:
        """Tokens of the prompts, each once, and of all texts."""
        results = list(results)
        n_prompt = sum(len(prompt.ids) for prompt in self.request.prompts)
        n_new = sum(len(result.token_ids) for result in results)
        n_cached = sum(result.n_cached for result in results[:: self.request.n])
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }

    def choice(
        self, number: int, part: Piece | Result, result: Result, n_chars: int | None = None
    ) -> dict[str, Any]:
        """A text, or its next piece, behind so many characters; None begins it."""
        which, is_first = number // self.request.n, n_chars is None
        choice: dict[str, Any] = {"index": number}
        logprobs = None
        if self.is_chat:
            role = {"role": "assistant"} if part is result else {}
            choice["message" if role else "delta"] = role | {"content": part.text}
            if self.request.params.logprobs:
                logprobs = {"content": self._chat_logprobs(part)}
        else:
            echo = self.echoes[which] if self.echoes and is_first else None
            choice["text"] = (echo or "") + part.text
            if self.body.logprobs is not None:
                echoed = None if echo is None else result.scores
                logprobs = self._logprobs(which, part, n_chars or 0, echoed)
        choice |= {"logprobs": logprobs, "finish_reason": _SPOKEN[part.finish_reason]}
        if self.body.return_token_ids:
            choice["token_ids"] = part.token_ids
            if is_first:
                choice["prompt_token_ids"] = self.request.prompts[which].ids
        return choice

    def _logprobs(
        self, which: int, part: Piece | Result, n_chars: int, echoed: Chosen | None
    ) -> dict[str, Any]:
        """The older shape: a list for each property."""
        tokenizer, prompt = self.service.tokenizer, self.request.prompts[which].ids
        ids, values, tops = list(part.token_ids), [*part.logprobs], [*part.top_logprobs]
        begins = echoed is not None or (not n_chars and tokenizer.starts_text(prompt))
        if echoed is not None:
            ids = [*prompt, *ids]
            values = [None, *(value for _, value, _ in echoed), *values]
            tops = [None, *(top or None for _, _, top in echoed), *tops]
        # A token's own text may have a space that encoding added, or a part of a character.
        decoder, offsets = StreamDecoder(tokenizer, begins), []
        for token in ids:
            offsets.append(n_chars)
            n_chars += len(decoder.push(token))
        text = partial(token_text, tokenizer)
        shown = [top and {text(i): _finite(p) for i, p in top} for top in tops]
        return {
            "tokens": [text(token) for token in ids],
            "token_logprobs": [value if value is None else _finite(value) for value in values],
            "top_logprobs": shown if self.body.logprobs else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, part: Piece | Result) -> list[dict[str, Any]]:
        """The newer shape: an object for each token."""
        tops = part.top_logprobs or [()] * len(part.token_ids)
        return [
            self._token(token, value) | {"top_logprobs": [self._token(*other) for other in top]}
            for token, value, top in zip(part.token_ids, part.logprobs, tops, strict=True)
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self.service.tokenizer
        known = {"token": token_text(tokenizer, token), "logprob": _finite(logprob)}
        return known | {"bytes": list(tokenizer.token_bytes(token))}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token alone; what is no whole character is replaced."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; OpenAI's interface says it like this
