"""What OpenAI's clients send, and how its fields become settings of the engine."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from codellama.engine import SamplingParams
from codellama.serve.generation import Edit
from codellama.serve.service import Service
from codellama.tokenizer.chat import Message


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number; JSON has 16.0 for 16, too."""
Text = str | list[str] | list[Whole] | list[list[Whole]]


class Body(BaseModel):
    """Types are taken literally, null is the default, unknown fields are ignored."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    stream: bool | None = None


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: bool | None = None


class Sampling(Body):
    """Fields that all of OpenAI's bodies share, and vLLM's extensions."""

    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    """Extension: the ids of the prompt and of the text in each choice."""
    suffix_first: bool | None = None
    """Extension: SPM instead of PSM."""
    trim_suffix: bool = False
    """Extension: without an end that repeats the suffix."""
    end_at_line: bool = False
    """Extension: a text that max_tokens cuts has no unfinished last line."""

    def params(self, service: Service, default_tokens: int, **more: Any) -> SamplingParams:
        """What the engine is asked for.

        Raises:
            ValueError: a value outside its range.
        """
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isdecimal() or int(key) >= service.tokenizer.vocab_size:
                n = service.tokenizer.vocab_size
                raise ValueError(f"logit_bias of {key!r}: expected token ids in [0, {n})")
            bias[int(key)] = value
        given = {
            "max_tokens": default_tokens if self.max_tokens is None else self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            "logit_bias": tuple(bias.items()),
        }
        names = ("top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")
        given |= {name: getattr(self, name) for name in (*names, "repetition_penalty")} | more
        return SamplingParams(**{key: value for key, value in given.items() if value is not None})

    @property
    def edit(self) -> Edit:
        """How the text is to end."""
        return Edit(trim_suffix=self.trim_suffix, whole_lines=self.end_at_line)


class CompletionBody(Sampling):
    """/v1/completions. A suffix, even an empty one, asks for what stands before it."""

    prompt: Text
    suffix: str | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[Whole, Field(ge=1, le=128)] | None = None


class FimBody(Sampling):
    """/v1/fim/completions, Mistral's shape."""

    prompt: str
    suffix: str | None = None
    random_seed: Whole | None = None


class Part(BaseModel):
    """A part of a message; only texts are understood."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message of a dialog."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> Message:
        """As the tokenizer takes it."""
        content = self.content
        if not isinstance(content, str):
            if wrong := next((p.type for p in content if p.type != "text"), None):
                raise ValueError(f"content part of type {wrong!r}: expected text")
            content = "".join(part.text or "" for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class JsonSchema(BaseModel):
    """A schema with its name."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> str | None:
        """The schema for the engine."""
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise ValueError("response_format.json_schema.schema: expected a JSON schema")
            return json.dumps(self.json_schema.schema_)
        return "{}" if self.type == "json_object" else None


class ChatBody(Sampling):
    """/v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self
