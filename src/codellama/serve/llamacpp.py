"""llama.cpp's dialect: /infill, /completion, and what its clients ask besides."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from codellama.engine import SamplingParams
from codellama.serve import prompts
from codellama.serve.generation import Edit, Request, Result
from codellama.serve.openai import token_text
from codellama.serve.openai_bodies import Body, Whole
from codellama.serve.replies import ApiError, as_events, as_json, user_mistakes
from codellama.serve.service import Client, Running, Service, Stream

router = APIRouter()
SUGGESTION_TOKENS = 128  # of /infill where the client does not say
Count = Annotated[Whole, Field(ge=-1)]


class Options(Body):
    """What /completion and /infill share; -1 stands for no limit."""

    n_predict: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    seed: Annotated[Whole, Field(ge=-1, lt=2**63)] | None = None
    stop: list[str] | None = None
    logit_bias: list[tuple[Whole, float]] | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    n_cmpl: Annotated[Whole, Field(ge=1, le=128)] | None = None
    n_indent: Annotated[Whole, Field(ge=0)] | None = None
    t_max_predict_ms: Annotated[float, Field(ge=0)] | None = None
    cache_prompt: bool | None = None
    response_fields: list[str] | None = None

    def request(
        self, prompt: prompts.Prompt, tokens: int, temperature: float, **edit: Any
    ) -> Request:
        """What the engine is asked for.

        Raises:
            ValueError: a value outside its range.
        """
        if self.grammar:
            raise ValueError("grammar: expected json_schema instead")
        n = self.n_cmpl or 1
        n_new = tokens if self.n_predict in (None, -1) else self.n_predict
        given = {
            # Nothing is to be generated, but the prompt is to be in the cache.
            "max_tokens": max(1, n_new or 0),
            "temperature": temperature if self.temperature is None else self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "repetition_penalty": self.repeat_penalty,
            "seed": None if self.seed == -1 else self.seed,
            "stop": self.stop and tuple(text for text in self.stop if text),
            "logit_bias": self.logit_bias and tuple(self.logit_bias),
            "schema": None if self.json_schema is None else json.dumps(self.json_schema),
        }
        names = ("top_p", "min_p", "presence_penalty", "frequency_penalty")
        given |= {name: getattr(self, name) for name in names}
        limit = self.t_max_predict_ms
        return Request(
            (prompt,),
            SamplingParams(**{key: value for key, value in given.items() if value is not None}),
            n,
            edit=Edit(
                min_indent=self.n_indent or 0,
                time_limit_s=limit / 1000 if limit else None,
                **edit,
            ),
        )


class CompletionBody(Options):
    """/completion."""

    prompt: str | list[Whole]


class Extra(BaseModel):
    """A part of another file."""

    filename: str | None = None
    text: str


class InfillBody(Options):
    """/infill; `prompt` is the beginning of the line that is being written."""

    input_prefix: str
    input_suffix: str
    input_extra: list[Extra] | None = None
    prompt: str | None = None
    suffix_first: bool | None = None
    """Extension: SPM instead of PSM."""


class TokenizeBody(Body):
    """/tokenize."""

    content: str
    add_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(Body):
    """/detokenize."""

    tokens: list[Whole]


@router.post("/completion")
async def completion(body: CompletionBody, service: Running, client: Client) -> Response:
    """Continue a prompt."""
    with user_mistakes():
        prompt = prompts.completion(service.tokenizer, body.prompt, service.recognise)
        request = body.request(prompt, service.max_context, 0.8)  # llama.cpp's temperature
    return await _reply(body, request, service, client)


@router.post("/infill")
async def infill(body: InfillBody, service: Running, client: Client) -> Response:
    """Fill a gap. What does not fit into the context is left out, and `truncated` says so.

    Without a temperature one suggestion is the likeliest, several are sampled.
    """
    if not service.tokenizer.supports_infilling:
        raise ApiError(501, f"{service.card.name} was not trained to infill")
    n_new = SUGGESTION_TOKENS if body.n_predict in (None, -1) else body.n_predict or 1
    with user_mistakes():
        prompt = prompts.infilling(
            service.tokenizer,
            body.input_prefix + (body.prompt or ""),
            body.input_suffix,
            service.suffix_first if body.suffix_first is None else body.suffix_first,
            [(extra.filename or "snippet", extra.text) for extra in body.input_extra or ()],
            service.max_context - min(n_new, service.max_context // 4),
        )
        several = (body.n_cmpl or 1) > 1
        request = body.request(prompt, SUGGESTION_TOKENS, 0.8 if several else 0, trim_suffix=True)
    return await _reply(body, request, service, client)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, service: Running) -> Response:
    """The ids of a text, with the text of each where asked."""
    with user_mistakes():
        ids = service.tokenizer.encode(body.content, bos=bool(body.add_special))
    if not body.with_pieces:
        return as_json({"tokens": ids})
    return as_json({"tokens": [{"id": i, "piece": token_text(service.tokenizer, i)} for i in ids]})


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: Running) -> Response:
    """The text of ids."""
    with user_mistakes():
        return as_json({"content": service.tokenizer.decode(body.tokens)})


@router.get("/props")
async def props(service: Running) -> Response:
    """What the server runs."""
    return as_json(
        {
            "default_generation_settings": {"n_ctx": service.max_context},
            "total_slots": service.limits.max_texts,
            "model_path": service.card.name,
            "chat_format": service.tokenizer.chat_format,
            "supports_infilling": service.tokenizer.supports_infilling,
            "suffix_first": service.suffix_first,
        }
    )


async def _reply(body: Options, request: Request, service: Service, client: str) -> Response:
    if body.stream:
        chunks = _chunks(body, service.stream(request, client), request, service)
        return await as_events(chunks, done=False)
    results = await service.results(request, client)
    replies = [_whole(body, n, result, request, service) for n, result in enumerate(results)]
    return as_json(replies if len(replies) > 1 else replies[0])


async def _chunks(
    body: Options, stream: Stream, request: Request, service: Service
) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(stream) as pieces:
        async for number, piece, result in pieces:
            chunk = {"index": number, "content": piece.text, "tokens": piece.token_ids}
            if piece.finish_reason is None:
                yield chunk | {"stop": False}
                continue
            last = _whole(body, number, result, request, service)
            yield last | {"content": "" if body.n_predict == 0 else piece.text}


def _whole(
    body: Options, number: int, result: Result, request: Request, service: Service
) -> dict[str, Any]:
    """The reply for one text, or those of its fields that the client wants."""
    prompt, params, tokenizer = result.prompt, request.params, service.tokenizer
    n_computed, n_new = len(prompt.ids) - result.n_cached, len(result.token_ids)
    if body.n_predict == 0:
        n_new = 0
    first_ms, total_ms = 1000 * result.first_s, 1000 * result.total_s
    decoded = tokenizer.decode(result.token_ids, keep_leading_space=True)
    word = next((s for s in params.stop if decoded.removesuffix("\ufffd").endswith(s)), "")
    stop_type = "limit" if result.finish_reason != "stop" else "word" if word else "eos"
    known: dict[str, Any] = {
        "index": number,
        "content": result.text if n_new else "",
        "tokens": result.token_ids[:n_new],
        "stop": True,
        "stop_type": stop_type,
        "stopping_word": word,
        "model": service.card.name,
        "prompt": tokenizer.decode(prompt.ids),
        "generation_settings": {
            "n_predict": params.max_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": params.seed,
            "stop": params.stop,
        },
        "timings": {
            "prompt_n": n_computed,
            "cache_n": result.n_cached,
            "prompt_ms": first_ms,
            "prompt_per_token_ms": first_ms / max(1, n_computed),
            "prompt_per_second": 1000 * n_computed / max(1e-3, first_ms),
            "predicted_n": n_new,
            "predicted_ms": total_ms - first_ms,
            "predicted_per_token_ms": (total_ms - first_ms) / max(1, n_new),
            "predicted_per_second": 1000 * n_new / max(1e-3, total_ms - first_ms),
        },
        "tokens_cached": len(prompt.ids) + n_new,
        "tokens_evaluated": len(prompt.ids),
        "tokens_predicted": n_new,
        "truncated": prompt.is_truncated,
    }
    if not body.response_fields:
        return known
    return {path: value for path in body.response_fields if (value := _at(known, path)) is not None}


def _at(known: dict[str, Any], path: str) -> Any:
    """A field by its path, such as timings/prompt_n; llama.cpp keeps the path as its name."""
    value: Any = known
    for name in path.split("/"):
        value = value.get(name) if isinstance(value, dict) else None
    return value
