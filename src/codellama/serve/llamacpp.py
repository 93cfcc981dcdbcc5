"""llama.cpp's dialect: /infill, /completion, and what its clients ask besides."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field

from codellama.serve.bodies import Body, Count, Factor, N, Sampling, Whole
from codellama.serve.generation import Edit, Request, Result
from codellama.serve.openai import token_text
from codellama.serve.prompts import Prompt
from codellama.serve.replies import as_events, as_json
from codellama.serve.service import Client, Ready, Service, Stream, beside

router = APIRouter()
SUGGESTION_TOKENS = 128  # of /infill where the client does not say


class _Options(Sampling):
    """What /completion and /infill share."""

    n_predict: Count | None = None
    repeat_penalty: Factor | None = None
    logit_bias: list[Annotated[list[float], Field(min_length=2, max_length=2)]] | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    n_cmpl: N | None = None
    n_indent: Annotated[Whole, Field(ge=0, le=1000)] | None = None
    t_max_predict_ms: Annotated[float, Field(ge=0)] | None = None
    response_fields: list[str] | None = None
    stream: bool | None = None

    def request(self, prompt: Prompt, n_tokens: int, temperature: float, trims: bool) -> Request:
        """What the engine is asked for."""
        if self.grammar:
            raise ValueError("grammar: expected json_schema instead")
        if self.seed == -1:
            self.seed = None
        if self.n_predict is not None and self.n_predict >= 0:
            # Where nothing is to be generated the prompt is still to be in the cache.
            n_tokens = max(1, self.n_predict)
        params = self.params(
            max_tokens=n_tokens,
            temperature=temperature,
            repetition_penalty=self.repeat_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias or ()),
            schema=None if self.json_schema is None else json.dumps(self.json_schema),
        )
        limit_s = self.t_max_predict_ms / 1000 if self.t_max_predict_ms else None
        edit = Edit(trim_suffix=trims, min_indent=self.n_indent or 0, time_limit_s=limit_s)
        return Request((prompt,), params, self.n_cmpl or 1, edit=edit)


class CompletionBody(_Options):
    """/completion."""

    prompt: str | list[Whole]


class _Extra(Body):
    filename: str | None = None
    text: str


class InfillBody(_Options):
    """/infill; `prompt` is the beginning of the line that is being written."""

    input_prefix: str
    input_suffix: str
    input_extra: list[_Extra] | None = None
    prompt: str | None = None
    suffix_first: bool | None = None
    """Ours: SPM instead of PSM."""


class TokenizeBody(Body):
    """/tokenize."""

    content: str
    add_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(Body):
    """/detokenize."""

    tokens: list[Whole]


@router.post("/completion")
async def completion(body: CompletionBody, service: Ready, client: Client) -> Response:
    """Continue a prompt."""
    prompt = await service.completion(body.prompt)
    request = body.request(prompt, service.most_tokens, 0.8, False)  # llama.cpp's temperature
    return await _reply(body, request, service, client)


@router.post("/infill")
async def infill(body: InfillBody, service: Ready, client: Client) -> Response:
    """Fill a gap. What does not fit into the context is left out, and `truncated` says so.

    Without a temperature one suggestion is the likeliest, several are sampled.
    """
    wanted = body.n_predict if body.n_predict and body.n_predict > 0 else SUGGESTION_TOKENS
    prefix = body.input_prefix + (body.prompt or "")
    files = [(extra.filename or "snippet", extra.text) for extra in body.input_extra or ()]
    prompt = await service.gap(prefix, body.input_suffix, body.suffix_first, files, wanted)
    temperature = 0.8 if (body.n_cmpl or 1) > 1 else 0.0
    n_tokens = min(SUGGESTION_TOKENS, service.most_tokens)
    request = body.request(prompt, n_tokens, temperature, True)
    return await _reply(body, request, service, client)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, service: Ready) -> Response:
    """The ids of a text, with the text of each where asked."""
    ids = await beside(service.tokenizer.encode, body.content, bool(body.add_special))
    if not body.with_pieces:
        return as_json({"tokens": ids})
    return as_json({"tokens": [{"id": i, "piece": token_text(service.tokenizer, i)} for i in ids]})


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: Ready) -> Response:
    """The text of ids."""
    return as_json({"content": service.tokenizer.decode(body.tokens)})


@router.get("/props")
async def props(service: Ready) -> Response:
    """What the server runs."""
    known = {"default_generation_settings": {"n_ctx": service.max_context}}
    known |= {"model_path": service.name, "total_slots": service.limits.max_texts}
    return as_json(known | {"capabilities": service.capabilities})


async def _reply(body: _Options, request: Request, service: Service, client: str) -> Response:
    if body.stream:
        chunks = _chunks(body, service.stream(request, client), request, service)
        return await as_events(chunks, done=b"")
    results = await service.results(request, client)
    replies = [_final(body, n, result, request, service) for n, result in enumerate(results)]
    return as_json(replies if len(replies) > 1 else replies[0])


async def _chunks(
    body: _Options, stream: Stream, request: Request, service: Service
) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(stream) as pieces:
        async for number, piece, result in pieces:
            text = "" if body.n_predict == 0 else piece.text
            chunk = {"index": number, "content": text, "tokens": piece.token_ids, "stop": False}
            if piece.finish_reason is not None:
                chunk = _final(body, number, result, request, service) | {"content": text}
            yield chunk


def _final(
    body: _Options, number: int, result: Result, request: Request, service: Service
) -> dict[str, Any]:
    """The reply for one text, or those of its fields that the client wants."""
    params, n_prompt = request.params, len(result.prompt.ids)
    n_new = 0 if body.n_predict == 0 else len(result.token_ids)
    written = service.tokenizer.decode(result.token_ids, keep_leading_space=True)
    word = next((word for word in params.stop if written.find(word, len(result.text)) >= 0), "")
    stopped = "word" if word else "eos"
    known: dict[str, Any] = {
        "index": number,
        "content": result.text if n_new else "",
        "tokens": result.token_ids[:n_new],
        "stop": True,
        "stop_type": stopped if result.finish_reason == "stop" else "limit",
        "stopping_word": word,
        "model": service.name,
        "prompt": service.tokenizer.decode(result.prompt.ids),
        "generation_settings": asdict(params),
        "timings": {
            "cache_n": result.n_cached,
            **_timing("prompt", n_prompt - result.n_cached, result.first_s),
            **_timing("predicted", n_new, result.total_s - result.first_s),
        },
        "tokens_cached": n_prompt + n_new,
        "tokens_evaluated": n_prompt,
        "truncated": result.prompt.is_truncated,
    }
    if not body.response_fields:
        return known
    return {path: value for path in body.response_fields if (value := _at(known, path)) is not None}


def _timing(name: str, n: int, duration_s: float) -> dict[str, float]:
    return {
        f"{name}_n": n,
        f"{name}_ms": 1000 * duration_s,
        f"{name}_per_token_ms": 1000 * duration_s / max(1, n),
        f"{name}_per_second": n / max(1e-6, duration_s),
    }


def _at(known: dict[str, Any], path: str) -> Any:
    """A field by its path, such as timings/prompt_n; llama.cpp keeps the path as its name."""
    value: Any = known
    for name in path.split("/"):
        value = value.get(name) if isinstance(value, dict) else None
    return value
