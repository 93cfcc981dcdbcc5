"""Tabby's dialect: /v1/completions with `segments`, and what its editor plugins look at."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from codellama.engine import SamplingParams
from codellama.serve import prompts
from codellama.serve.generation import Edit, Request
from codellama.serve.replies import ApiError, as_json, user_mistakes
from codellama.serve.service import Running, Service

router = APIRouter()
NEW_TOKENS = 64  # as Tabby's own server


class Snippet(BaseModel):
    """A part of another file."""

    filepath: str
    body: str


class Segments(BaseModel):
    """What stands around the cursor, and elsewhere."""

    prefix: str
    suffix: str | None = None
    filepath: str | None = None
    declarations: list[Snippet] | None = None
    relevant_snippets_from_changed_files: list[Snippet] | None = None
    relevant_snippets_from_recently_opened_files: list[Snippet] | None = None

    def files(self) -> list[tuple[str, str]]:
        """All snippets, the most useful last."""
        groups = (
            self.relevant_snippets_from_recently_opened_files,
            self.relevant_snippets_from_changed_files,
            self.declarations,
        )
        return [(s.filepath, s.body) for group in groups for s in group or ()]


class DebugOptions(BaseModel):
    """What the reply should show."""

    return_prompt: bool | None = None


class Body(BaseModel):
    """/v1/completions with segments."""

    model_config = ConfigDict(strict=True)
    language: str | None = None
    segments: Segments
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    mode: Literal["standard", "next_edit_suggestion"] | None = None
    debug_options: DebugOptions | None = None


async def complete(body: Body, service: Service, client: str) -> Response:
    """One suggestion for the gap between the segments."""
    if body.mode == "next_edit_suggestion":
        raise ApiError(400, "mode 'next_edit_suggestion': expected 'standard'", param="mode")
    segments = body.segments
    with user_mistakes():
        prompt = prompts.infilling(
            service.tokenizer,
            segments.prefix,
            segments.suffix or "",
            service.suffix_first,
            segments.files(),
            service.max_context - NEW_TOKENS,
        )
        params = SamplingParams(NEW_TOKENS, body.temperature or 0.0, seed=body.seed)
    edit = Edit(trim_suffix=True)
    [result] = await service.results(
        Request((prompt,), params, edit=edit, is_infilling=True), client
    )
    reply: dict[str, Any] = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "choices": [{"index": 0, "text": result.text}],
        "mode": "standard",
    }
    if body.debug_options and body.debug_options.return_prompt:
        reply["debug_data"] = {"prompt": service.tokenizer.decode(prompt.ids)}
    return as_json(reply)


@router.get("/v1/health")
async def health(service: Running) -> Response:
    """What Tabby's plugins ask before they begin."""
    return as_json({"model": service.card.name, "device": "codellama", "models": {}})


@router.post("/v1/events", status_code=204)
async def events() -> Response:
    """What users did with suggestions; not kept."""
    return Response(status_code=204)
