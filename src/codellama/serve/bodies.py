"""What the bodies of all dialects share: how they are read, and the settings of sampling."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from codellama.engine import SamplingParams
from codellama.tokenizer.chat import Message


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""JSON has 16.0 for 16, too."""
Count = Annotated[Whole, Field(ge=-2, lt=2**31)]
"""Negative where there is no limit."""
N = Annotated[Whole, Field(ge=1, le=128)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-100, le=100)]
Factor = Annotated[float, Field(ge=0.01, le=100)]


class Body(BaseModel):
    """Types are taken literally, null is the default, unknown fields are ignored."""

    model_config = ConfigDict(strict=True)


class Sampling(Body):
    """Settings that have the same names everywhere."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: _Share | None = None
    top_k: Count | None = None
    min_p: _Share | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None

    def params(self, **given: Any) -> SamplingParams:
        """The engine's settings: what the body says, before what is given; None says nothing."""
        given |= {n: said for n in Sampling.model_fields if (said := getattr(self, n)) is not None}
        given["top_k"] = max(0, given.get("top_k") or 0)
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


class _Part(Body):
    type: str
    text: str | None = None


class ChatMessage(Body):
    """One message of a dialog, with texts only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> Message:
        """As the tokenizer takes it; a ValueError where it holds something else."""
        content = self.content
        if not isinstance(content, str):
            if wrong := next((part.type for part in content if part.type != "text"), None):
                raise ValueError(f"content part of type {wrong!r}: expected text")
            content = "".join(part.text or "" for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _JsonSchema(Body):
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    def schema_text(self) -> str | None:
        """The schema for the engine; a ValueError where it is missing."""
        if self.type != "json_schema":
            return "{}" if self.type == "json_object" else None
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ValueError("response_format.json_schema.schema: expected a JSON schema")
        return json.dumps(self.json_schema.schema_)
