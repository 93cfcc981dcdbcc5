"""One OpenAI-compatible server: what is asked of it, and how its answers are read.

vLLM, SGLang, llama.cpp's server and ours answer POST /v1/completions and /v1/chat/completions with
one JSON object, or as server-sent events with a part of it each. Fields beyond OpenAI's are vLLM's;
servers that do not know them ignore them.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import httpx

from codellama.engine.generator import Ask
from codellama.engine.sampling import MAX_TOKENS, SamplingParams
from codellama.engine.sequence import Piece
from codellama.tokenizer import Tokenizer

MAX_WAIT_S = 30.0  # before a server that failed is asked again
DESCRIBE_S = 10.0
_PROBE = "def f(x):\n    return 'é'"
_SAME_NAMES = (
    *("top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


class FailedError(Exception):
    """A server did not answer, or said that it could not now; another may."""

    def __init__(self, reason: str, wait_s: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.is_busy = wait_s, is_busy


class Upstream:
    """One server, and how it is doing.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, url: str, model: str | None, tokenizer: Tokenizer | None) -> None:
        url = url.strip().rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint {url!r}: expected an address such as http://host:8000/v1")
        self.url = url if url.endswith("/v1") else url + "/v1"
        self.model = model
        self.max_context: int | None = None
        """What it says, once asked."""
        self.busy: set[object] = set()  # one for each request; sets are safe between threads
        self.resting_until = self.busy_until = 0.0
        self.problem: str | None = None
        """What was wrong with its last answer."""
        self._tokenizer = tokenizer
        self._n_failures = 0
        self._is_foreign = False

    def note(self, error: BaseException | None) -> None:
        """Remember how a request went; after failures the server rests, ever longer."""
        is_well = error is None or getattr(error, "is_busy", False)
        self.problem = None if is_well else str(error) or type(error).__name__
        if error is None:
            self._n_failures = 0
        elif time.monotonic() > self.resting_until:  # else it was under way when another failed
            self._n_failures += 1
            wait_s = max(getattr(error, "wait_s", 0.0), 0.25 * 2 ** min(self._n_failures, 10))
            self.resting_until = time.monotonic() + min(wait_s, MAX_WAIT_S)
            self.busy_until = self.resting_until if is_well else 0.0

    async def describe(self, client: httpx.AsyncClient) -> None:
        """Ask for the model's name, where none was given, and its context.

        Raises:
            ValueError: it refuses.
            FailedError: it failed, or its vocabulary is not the tokenizer's.
        """
        response = await client.get(self.url + "/models", timeout=DESCRIBE_S)
        await _check(response)
        try:
            models = response.json()["data"]
            model = next((m for m in models if m["id"] == self.model), models[0])
            self.model = self.model or model["id"]
            told = model.get("max_model_len") or (model.get("meta") or {}).get("n_ctx_train")
            self.max_context = told or MAX_TOKENS
        except (ValueError, LookupError, TypeError, AttributeError):
            raise FailedError("/models has not OpenAI's form") from None
        self._is_foreign = not await self._has_our_ids(client)
        if self._is_foreign:
            raise FailedError(f"its ids are not those of the tokenizer; {self.model} is another")

    async def _has_our_ids(self, client: httpx.AsyncClient) -> bool:
        """Whether a text has the same ids there; true where a server cannot be asked."""
        if self._tokenizer is None:
            return True
        expected = self._tokenizer.encode(_PROBE)
        body = {"model": self.model, "prompt": _PROBE, "add_special_tokens": False}  # vLLM
        url = self.url.removesuffix("/v1") + "/tokenize"
        reply = await client.post(url, json=body | {"content": _PROBE}, timeout=DESCRIBE_S)
        try:
            return reply.status_code != 200 or reply.json()["tokens"] == expected
        except (ValueError, LookupError, TypeError):
            return True

    async def pieces(
        self, client: httpx.AsyncClient, ask: Ask, streams: bool
    ) -> AsyncGenerator[Piece]:
        """The pieces of a text, the last of them without text.

        Raises:
            ValueError: the server refuses the request.
            FailedError: it failed.
            httpx.HTTPError: so did the connection.
        """
        if self.model is None or self._is_foreign:
            await self.describe(client)
        path, body = request_of(ask)
        body |= {"model": self.model, "stream": streams}
        if streams:
            body["stream_options"] = {"include_usage": True}
        if ask.echo:
            body["echo"] = True
        if self._tokenizer is not None and self._tokenizer.eot_id in ask.stop_ids:
            # What servers that do not know stop_token_ids may write for it.
            body["stop"] = [*ask.params.stop, " <EOT>"]
        finish, n_cached = None, 0
        async with client.stream("POST", self.url + path, json=body) as response:
            await _check(response)
            async for data in _parts(response, streams):
                try:
                    reply = json.loads(data)
                    if reply.get("error"):
                        raise FailedError(_reason(data))
                    details = (reply.get("usage") or {}).get("prompt_tokens_details") or {}
                    n_cached = details.get("cached_tokens") or n_cached
                    pieces = [self._piece(choice, ask.params) for choice in reply["choices"][:1]]
                except (ValueError, LookupError, TypeError, AttributeError):
                    raise FailedError(f"no completion of OpenAI's form: {data[:80]!r}") from None
                for piece in pieces:
                    finish = piece.finish_reason or finish
                    if not streams and finish is None:  # before anybody has it
                        break
                    if piece.text or piece.token_ids:
                        yield replace(piece, finish_reason=None)
        if finish is None:
            raise FailedError("the answer ended before the text did")
        yield Piece("", (), (), (), "cancelled" if finish == "abort" else finish, n_cached)

    def _piece(self, choice: dict[str, Any], params: SamplingParams) -> Piece:
        """What a completion's choice says, or a chat completion's, or a part of either."""
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        text = said.get("content") or ""
        ids = choice.get("token_ids")
        if ids is None:  # then as we would write it
            ids = self._tokenizer.encode_without_prefix_space(text) if self._tokenizer else ()
        found = choice.get("logprobs") or {}
        if "content" in found:  # chat
            rows = found["content"] or ()
            logprobs = [row["logprob"] for row in rows]
            tops = [
                {t["token"]: t["logprob"] for t in row.get("top_logprobs") or ()} for row in rows
            ]
        else:
            logprobs, tops = found.get("token_logprobs") or (), found.get("top_logprobs") or ()
        n_top = params.top_logprobs
        ranked = [
            tuple((self._id_of(token), p) for token, p in (top or {}).items())[:n_top]
            for top in (tops if n_top else ())
        ]
        finish = choice.get("finish_reason")
        return Piece(text, tuple(ids), tuple(logprobs), tuple(ranked), finish, 0)

    def _id_of(self, token: str) -> int:
        """The id of a token as a server writes it: `token_id:7`, or its text."""
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        ids = self._tokenizer.encode_without_prefix_space(token) if self._tokenizer else []
        return ids[0] if len(ids) == 1 else Tokenizer.unk_id


def request_of(ask: Ask) -> tuple[str, dict[str, Any]]:
    """Where a text is asked for, and in which fields; what is as usual is left out."""
    params, usual = ask.params, SamplingParams()
    body: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,  # llama.cpp's own is 0.95
        "return_token_ids": True,
    }
    is_chat = not isinstance(ask.prompt, str) and isinstance(next(iter(ask.prompt), 0), dict)
    body["messages" if is_chat else "prompt"] = ask.prompt
    if ask.suffix is not None:
        body["suffix"] = ask.suffix
    if ask.stop_ids:
        body["stop_token_ids"] = ask.stop_ids
    for name in _SAME_NAMES:
        if (value := getattr(params, name)) != getattr(usual, name):
            body[name] = value
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    if params.logprobs or params.top_logprobs:
        top = {"logprobs": True, "top_logprobs": params.top_logprobs}
        body |= top if is_chat else {"logprobs": max(1, params.top_logprobs)}
        body["return_tokens_as_token_ids"] = True
    if params.schema is not None:
        schema = json.loads(params.schema)
        named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        body["response_format"] = named if schema else {"type": "json_object"}
    return "/chat/completions" if is_chat else "/completions", body


async def _parts(response: httpx.Response, streams: bool) -> AsyncGenerator[bytes]:
    """The data of server-sent events, or the whole body."""
    if not streams:
        yield await response.aread()
        return
    # Not `aiter_lines`: it also breaks lines at U+2028 and others that JSON may hold.
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                yield line[5:]


async def _check(response: httpx.Response) -> None:
    """Raise what a server has against a request."""
    status = response.status_code
    if status == 200:
        return
    reason = f"HTTP {status}: {_reason(await response.aread())}"
    if status in (408, 429) or status >= 500:
        wait = response.headers.get("retry-after", "")
        raise FailedError(reason, float(wait) if wait.isdigit() else 0.0, is_busy=status == 429)
    raise ValueError(f"{response.url}: {reason}")


def _reason(data: bytes) -> str:
    """What a server says, in one line."""
    return " ".join(data.decode(errors="replace").split())[:300]
