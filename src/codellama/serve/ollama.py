"""Ollama's dialect: generate with a suffix, chat, and the model as its clients look it up."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from codellama.artifact import code_version
from codellama.engine import SamplingParams
from codellama.serve import prompts
from codellama.serve.generation import Request, Result
from codellama.serve.openai_bodies import Body, ChatMessage, Whole
from codellama.serve.replies import ApiError, as_json, as_lines, user_mistakes
from codellama.serve.service import Client, Running, Service, Stream

router = APIRouter(prefix="/api")
TEMPLATE = (
    "{{- if .Suffix }}<PRE> {{ .Prompt }} <SUF>{{ .Suffix }} <MID>"
    "{{- else }}{{ .Prompt }}{{- end }}"
)


class Options(BaseModel):
    """Settings of the engine; -1 stands for no limit."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    num_predict: Annotated[Whole, Field(ge=-2)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None


class Asked(Body):
    """What generate and chat share; they stream unless told otherwise."""

    options: Options | None = None
    format: str | dict[str, Any] | None = None

    def params(self, service: Service) -> SamplingParams:
        """What the engine is asked for, with Ollama's defaults.

        Raises:
            ValueError: a value outside its range.
        """
        options = self.options or Options()
        if isinstance(self.format, str) and self.format not in ("", "json"):
            raise ValueError(f'format {self.format!r}: expected "json" or a JSON schema')
        schema = self.format and ("{}" if self.format == "json" else json.dumps(self.format))
        n = options.num_predict
        given = {
            "max_tokens": service.max_context if n is None or n < 0 else n,
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 40,
            "schema": schema or None,
        }
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed")
        said = {name: getattr(options, name) for name in names}
        said["repetition_penalty"] = options.repeat_penalty
        said["top_k"] = None if options.top_k is None else max(0, options.top_k)
        said["stop"] = (options.stop,) if isinstance(options.stop, str) else options.stop
        given |= {name: value for name, value in said.items() if value is not None}
        return SamplingParams(**given)


class GenerateBody(Asked):
    """/api/generate; with `raw`, or without, the prompt is taken as it is."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None


class ChatBody(Asked):
    """/api/chat."""

    messages: list[ChatMessage] | None = None
    tools: list[Any] | None = None


class ShowBody(BaseModel):
    """/api/show."""

    model: str | None = None
    name: str | None = None


@router.post("/generate")
async def generate(body: GenerateBody, service: Running, client: Client) -> Response:
    """Continue a prompt, or fill the gap before a suffix that is not empty."""
    tokenizer = service.tokenizer
    if body.suffix and not tokenizer.supports_infilling:
        raise ApiError(400, f"{service.card.name} does not support insert")
    if not body.prompt and not body.suffix:  # how clients load a model
        return as_json(_line(service, "generate", "") | {"done": True, "done_reason": "load"})
    with user_mistakes():
        params = body.params(service)
        if body.suffix:
            first = service.suffix_first
            prompt = prompts.infilling(tokenizer, body.prompt or "", body.suffix, first)
        else:
            text = f"{body.system}\n\n{body.prompt}" if body.system else body.prompt or ""
            prompt = prompts.completion(tokenizer, text, service.recognise)
    request = Request((prompt,), params, is_infilling=bool(body.suffix))
    return await _reply("generate", body, request, service, client)


@router.post("/chat")
async def chat(body: ChatBody, service: Running, client: Client) -> Response:
    """Answer a dialog."""
    if body.tools:
        raise ApiError(400, f"{service.card.name} does not support tools")
    if not body.messages:
        return as_json(_line(service, "chat", "") | {"done": True, "done_reason": "load"})
    with user_mistakes():
        prompt = prompts.dialog(service.tokenizer, [m.plain() for m in body.messages])
        request = Request((prompt,), body.params(service))
    return await _reply("chat", body, request, service, client)


@router.get("/tags")
async def tags(service: Running) -> Response:
    """The one model that is served."""
    card = service.card
    entry = {
        "name": f"{card.name}:latest",
        "model": f"{card.name}:latest",
        "modified_at": _time(card.created),
        "size": card.meta.get("size", 0),
        "digest": sha256(card.name.encode()).hexdigest(),
        "details": _details(service),
    }
    return as_json({"models": [entry]})


@router.post("/show")
async def show(body: ShowBody, service: Running) -> Response:
    """What the model can do; clients look for .Suffix in the template."""
    can_infill = service.tokenizer.supports_infilling
    return as_json(
        {
            "template": TEMPLATE if can_infill else "{{ .Prompt }}",
            "parameters": "",
            "details": _details(service),
            "model_info": {
                "general.architecture": "llama",
                "llama.context_length": service.max_context,
            },
            "capabilities": ["completion"] + ["insert"] * can_infill,
            "modified_at": _time(service.card.created),
        }
    )


@router.get("/version")
async def version() -> Response:
    """The version of this server."""
    return as_json({"version": code_version()})


def _details(service: Service) -> dict[str, Any]:
    n = service.card.meta.get("n_params", 0)
    size = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
    return {"format": "safetensors", "family": "llama", "families": ["llama"]} | {
        "parameter_size": size,
        "quantization_level": service.card.meta.get("precision", "unknown"),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _line(service: Service, route: str, text: str) -> dict[str, Any]:
    """A piece of text in the shape of a route."""
    message = {"message": {"role": "assistant", "content": text}}
    known = {"model": service.card.name, "created_at": _time(datetime.now(UTC).timestamp())}
    return known | ({"response": text} if route == "generate" else message) | {"done": False}


def _done(result: Result) -> dict[str, Any]:
    """What the last line adds; durations in nanoseconds."""
    return {
        "done": True,
        "done_reason": "stop" if result.finish_reason == "stop" else "length",
        "total_duration": int(1e9 * result.total_s),
        "load_duration": 0,
        "prompt_eval_count": len(result.prompt.ids),
        "prompt_eval_duration": int(1e9 * result.first_s),
        "eval_count": len(result.token_ids),
        "eval_duration": int(1e9 * (result.total_s - result.first_s)),
    }


async def _reply(
    route: str, body: Asked, request: Request, service: Service, client: str
) -> Response:
    if body.stream is False:
        [result] = await service.results(request, client)
        return as_json(_line(service, route, result.text) | _done(result))
    return await as_lines(_lines(route, service, service.stream(request, client)))


async def _lines(route: str, service: Service, stream: Stream) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(stream) as pieces:
        async for _, piece, result in pieces:
            if piece.text and piece.finish_reason:
                yield _line(service, route, piece.text)
            if piece.finish_reason:
                yield _line(service, route, "") | _done(result)
            else:
                yield _line(service, route, piece.text)
