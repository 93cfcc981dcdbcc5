"""Ollama's dialect: generate with a suffix, chat, and the model as its clients look it up."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Response

from codellama.artifact import code_version
from codellama.engine import SamplingParams
from codellama.serve.bodies import Body, ChatMessage, Count, Factor, Sampling
from codellama.serve.generation import Request, Result
from codellama.serve.replies import ApiError, as_json, as_lines
from codellama.serve.service import Client, Ready, Service, Stream

router = APIRouter(prefix="/api")
TEMPLATE = (
    "{{- if .Suffix }}<PRE> {{ .Prompt }} <SUF>{{ .Suffix }} <MID>"
    "{{- else }}{{ .Prompt }}{{- end }}"
)


class _Options(Sampling):
    num_predict: Count | None = None
    repeat_penalty: Factor | None = None


class _Asked(Body):
    """What generate and chat share; they stream unless told otherwise."""

    options: _Options | None = None
    format: str | dict[str, Any] | None = None
    stream: bool | None = None

    def settings(self, service: Service) -> SamplingParams:
        """What the engine is asked for, with Ollama's defaults."""
        options = self.options or _Options()
        if self.format and self.format != "json" and not isinstance(self.format, dict):
            raise ValueError(f'format {self.format!r}: expected "json" or a JSON schema')
        n = options.num_predict
        return options.params(
            max_tokens=service.most_tokens if n is None or n < 0 else n,
            temperature=0.8,
            top_p=0.9,
            top_k=40,
            repetition_penalty=options.repeat_penalty,
            schema="{}" if self.format == "json" else self.format and json.dumps(self.format),
        )


class GenerateBody(_Asked):
    """/api/generate; with `raw` or without, the prompt is taken as it is."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None


class ChatBody(_Asked):
    """/api/chat."""

    messages: list[ChatMessage] | None = None
    tools: list[Any] | None = None


@router.post("/generate")
async def generate(body: GenerateBody, service: Ready, client: Client) -> Response:
    """Continue a prompt, or fill the gap before a suffix that is not empty."""
    text = "\n\n".join(filter(None, (body.system, body.prompt)))
    if not text and not body.suffix:  # how clients load a model
        return as_json(_line(service, "response", "") | {"done": True, "done_reason": "load"})
    if body.suffix:
        prompt = await service.gap(body.prompt or "", body.suffix)
    else:
        prompt = await service.completion(text)
    request = Request((prompt,), body.settings(service))
    return await _reply("response", body, request, service, client)


@router.post("/chat")
async def chat(body: ChatBody, service: Ready, client: Client) -> Response:
    """Answer a dialog."""
    if body.tools:
        raise ApiError(400, f"{service.name} does not support tools")
    if not body.messages:
        return as_json(_line(service, "message", "") | {"done": True, "done_reason": "load"})
    request = Request((await service.dialog(body.messages),), body.settings(service))
    return await _reply("message", body, request, service, client)


@router.get("/tags")
async def tags(service: Ready) -> Response:
    """The one model that is served."""
    name = f"{service.name}:latest"
    entry = {"name": name, "model": name, "size": service.meta.get("size", 0)}
    entry |= {"digest": sha256(name.encode()).hexdigest(), "details": _details(service)}
    return as_json({"models": [entry | {"modified_at": _time(service.created)}]})


@router.post("/show")
async def show(service: Ready) -> Response:
    """What the one model can do, whatever its name; clients look for .Suffix in the template."""
    template = TEMPLATE if service.tokenizer.supports_infilling else "{{ .Prompt }}"
    info = {"general.architecture": "llama", "llama.context_length": service.max_context}
    known = {"template": template, "parameters": "", "details": _details(service)}
    known |= {"model_info": info, "capabilities": service.capabilities}
    return as_json(known | {"modified_at": _time(service.created)})


@router.get("/version")
async def version() -> Response:
    """The version of this server."""
    return as_json({"version": code_version()})


def _details(service: Service) -> dict[str, Any]:
    known = {"format": "safetensors", "family": "llama", "families": ["llama"]}
    known["parameter_size"] = f"{service.meta.get('n_params', 0) / 1e6:.1f}M"
    return known | {"quantization_level": service.meta.get("precision", "unknown")}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _line(service: Service, field: str, text: str) -> dict[str, Any]:
    """A piece of text, as a `response` or a `message`."""
    value = text if field == "response" else {"role": "assistant", "content": text}
    now = _time(datetime.now(UTC).timestamp())
    return {"model": service.name, "created_at": now, field: value, "done": False}


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
    field: str, body: _Asked, request: Request, service: Service, client: str
) -> Response:
    if body.stream is False:
        [result] = await service.results(request, client)
        return as_json(_line(service, field, result.text) | _done(result))
    return await as_lines(_lines(field, service, service.stream(request, client)))


async def _lines(field: str, service: Service, stream: Stream) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(stream) as pieces:
        async for _, piece, result in pieces:
            line = _line(service, field, piece.text)
            yield line | _done(result) if piece.finish_reason else line
