"""What every dialect parses into and renders from: a Request, its pieces, its Results."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from codellama.engine import Piece, SamplingParams
from codellama.engine.runner import Chosen
from codellama.serve.prompts import Prompt

MIN_REPEATED_CHARS = 4  # shorter repeats are as often meant: `f(g(x)` before `)`
_WINDOW_CHARS = 2_000


@dataclass(frozen=True)
class Edit:
    """How an editor wants a text to end."""

    trim_suffix: bool = False
    """Without an end that repeats the beginning of the suffix, spaces aside."""
    whole_lines: bool = False
    """Without an unfinished last line, where max_tokens cut it and another line is left."""
    min_indent: int = 0
    """Before the first new line that is indented by fewer characters."""
    time_limit_s: float | None = None
    """After so much time since the first token, but not within the first line."""


@dataclass(frozen=True)
class Request:
    """What one HTTP request asks for: n results of each prompt, out of best_of."""

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    n: int = 1
    best_of: int | None = None
    edit: Edit = Edit()
    n_scored: int | None = None
    """Likeliest tokens wanted at each place of the prompts, which are scored then; None if not."""

    @property
    def n_tried(self) -> int:
        """Texts that are written for each prompt."""
        return self.best_of or self.n


@dataclass
class Result:
    """One generated text and how it came about."""

    prompt: Prompt
    scores: Chosen = field(default_factory=list)
    """The prompt's tokens after the first, where the request wants them."""
    begin: float = field(default_factory=time.perf_counter)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: str | None = None
    n_cached: int = 0
    first_s: float = 0.0
    """From the request to the first piece."""
    total_s: float = 0.0
    on_first: Callable[[Result], None] = lambda result: None

    def add(self, piece: Piece) -> None:
        """Take in the next piece."""
        self.total_s = time.perf_counter() - self.begin
        if not self.first_s:
            self.first_s = self.total_s
            self.on_first(self)
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.top_logprobs += piece.top_logprobs
        self.finish_reason, self.n_cached = piece.finish_reason, piece.n_cached


async def edited(pieces: AsyncGenerator[Piece], edit: Edit, suffix: str) -> AsyncGenerator[Piece]:
    """The pieces with their text ended as asked; what may still be cut is held back."""
    text, n_sent, first = "", 0, None
    outdented = re.compile(rf"\n(?=[^\S\n]{{0,{max(1, edit.min_indent) - 1}}}\S)")
    head = "".join(suffix[:_WINDOW_CHARS].split()) if edit.trim_suffix else ""
    async with aclosing(pieces) as stream:
        async for piece in stream:
            first = first or time.perf_counter()
            text += piece.text
            reason = piece.finish_reason
            end = len(text)
            if edit.min_indent and (line := outdented.search(text)):
                end, reason = line.end(), "stop"
            limit = edit.time_limit_s
            if limit is not None and "\n" in text and time.perf_counter() - first > limit:
                reason = reason or "length"
            if edit.whole_lines and reason in (None, "length"):
                line = text.rfind("\n", 0, end) + 1
                end = line if line or reason is None else end
            if head:
                start, n_chars = repeated(text[:end], head)
                if reason is None or n_chars >= MIN_REPEATED_CHARS:
                    end = start
            end = max(end, n_sent)
            yield replace(piece, text=text[n_sent:end], finish_reason=reason)
            n_sent = end
            if reason is not None:
                return


def repeated(text: str, head: str) -> tuple[int, int]:
    """Where the longest end of a text starts that begins `head`, and its length; spaces aside."""
    tail = "".join(text[-_WINDOW_CHARS:].split())
    n = next((n for n in range(min(len(tail), len(head)), 0, -1) if tail.endswith(head[:n])), 0)
    at, left = len(text), n
    while left:
        at -= 1
        left -= not text[at].isspace()
    return at, n
