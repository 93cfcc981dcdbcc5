"""Tabby's dialect: /v1/completions with `segments`, and what its editor plugins look at."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field

from codellama.artifact import code_version
from codellama.engine import SamplingParams
from codellama.serve import bodies
from codellama.serve.generation import Edit, Request
from codellama.serve.replies import as_json
from codellama.serve.service import Ready, Service

router = APIRouter()
NEW_TOKENS = 64  # as Tabby's own server


class _Snippet(bodies.Body):
    filepath: str
    body: str


class _Segments(bodies.Body):
    prefix: str
    suffix: str | None = None
    relevant_snippets_from_recently_opened_files: list[_Snippet] | None = None
    relevant_snippets_from_changed_files: list[_Snippet] | None = None
    declarations: list[_Snippet] | None = None


class _DebugOptions(bodies.Body):
    return_prompt: bool | None = None


class Body(bodies.Body):
    """/v1/completions with segments: what stands around the cursor, and elsewhere."""

    segments: _Segments
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    mode: Literal["standard"] | None = None
    debug_options: _DebugOptions | None = None


async def complete(body: Body, service: Service, client: str) -> Response:
    """One suggestion for the gap between the segments; snippets go where the room is short."""
    segments = body.segments
    snippets = (
        *(segments.relevant_snippets_from_recently_opened_files or ()),
        *(segments.relevant_snippets_from_changed_files or ()),
        *(segments.declarations or ()),
    )
    files = [(snippet.filepath, snippet.body) for snippet in snippets]
    prompt = await service.gap(segments.prefix, segments.suffix or "", None, files, NEW_TOKENS)
    n_tokens = min(NEW_TOKENS, service.most_tokens)
    params = SamplingParams(n_tokens, body.temperature or 0.0, seed=body.seed)
    request = Request((prompt,), params, edit=Edit(trim_suffix=True))
    [result] = await service.results(request, client)
    reply: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "mode": "standard"}
    reply["choices"] = [{"index": 0, "text": result.text}]
    if body.debug_options and body.debug_options.return_prompt:
        reply["debug_data"] = {"prompt": service.tokenizer.decode(prompt.ids)}
    return as_json(reply)


@router.get("/v1/health")
async def health(service: Ready) -> Response:
    """What Tabby's plugins ask before they begin; they read the version, and fail without one."""
    version = {"git_describe": code_version()}
    return as_json({"model": service.name, "device": "cpu", "models": {}, "version": version})
