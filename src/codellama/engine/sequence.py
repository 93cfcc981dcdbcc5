"""One prompt on its way through the engine: its tokens, its text so far, and why it ended.

Plain Python over integers and text; no tensors. Stop strings are found across token borders: text
that could still become one is held back, so a caller that streams never sees a part of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codellama.engine.sampling import SamplingParams
from codellama.engine.scheduler import Job
from codellama.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from codellama.engine.speculate import Guesser

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Completion:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]
    """Generated ids, without the one that ended the text."""
    logprobs: tuple[float, ...] | None
    """Natural logarithm of each token's probability under the model, before temperature; only
    when asked for."""
    finish_reason: str
    """`stop` (a stop id or string), `length` (max_tokens or the context is full), `cancelled`."""
    prompt_tokens: int = 0
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    """The most likely ids at each token and their log-probabilities; only when asked for."""
    prompt_logprobs: tuple[float, ...] | None = None
    """Of each token of the prompt after the first; only when asked for."""


@dataclass(frozen=True)
class Piece:
    """What a generation brought since the piece before: joined, pieces make the completion."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """As in `Completion`; none where they were not asked for."""
    top_logprobs: tuple[TopLogprobs, ...]
    finish_reason: str | None
    """Of the last piece, None before."""
    n_cached: int
    """Prompt tokens whose keys and values another sequence had left in the cache."""


class Sequence(Job):
    """One running generation: `accept` takes tokens until there is a `finish_reason`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Ids[int],
        params: SamplingParams,
        stop_ids: Ids[int],
        max_context: int,
        seed: int,
        matcher: LLMatcher | None = None,
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(prompt) > max_context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, the model's context {max_context}"
            )
        super().__init__(list(prompt))
        self.n_prompt = len(prompt)
        self.params = params
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finish_reason: str | None = "length" if params.max_tokens == 0 else None
        self.text = ""
        """Everything that is certain to be in the result."""
        self._n_read = self._n_chars_read = 0
        self._pending = ""
        """Decoded text that may turn out to begin a stop string."""
        self.error: Exception | None = None
        """What went wrong where nothing more can come; then it is finished too."""
        self.guesser: Guesser | None = None
        self.matcher = matcher
        """Knows which tokens keep to the schema, where there is one."""
        self.changes_logits = params.changes_logits
        self.n_written = dict.fromkeys(prompt, 0) if params.has_penalties else {}
        """How often each id was generated; those of the prompt stand in it too."""
        self._random = random.Random(seed)
        self._draws: list[float] = []
        self.stop_ids = frozenset(stop_ids)
        if matcher is not None:
            self.stop_ids |= {tokenizer.eos_id}
        self._max_context = max_context
        self._decoder = StreamDecoder(tokenizer, tokenizer.starts_text(self.tokens))

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens."""
        return self.tokens[self.n_prompt :]

    @property
    def n_left(self) -> int:
        """Tokens that may still be generated."""
        n_generated = len(self.tokens) - self.n_prompt
        return min(self.params.max_tokens - n_generated, self._max_context - len(self.tokens))

    def draw(self, position: int) -> float:
        """The uniform number in [0, 1) that decides about the token at a position.

        It belongs to the position: guesses that fail and repeated computation change nothing.
        """
        number = position - self.n_prompt
        while len(self._draws) <= number:
            self._draws.append(self._random.random())
        return self._draws[number]

    def accept(self, token: int, logprob: float, top: TopLogprobs = ()) -> None:
        """Add a generated token."""
        if self.matcher is not None:
            if token not in self.stop_ids:
                self.matcher.consume_token(token)
            if self.matcher.is_error():
                return self.fail(ValueError(f"grammar: {self.matcher.get_error()[:200]}"))
        if token in self.stop_ids:
            return self._finish("stop")
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        if self.params.has_penalties:
            self.n_written[token] = self.n_written.get(token, 0) + 1
        self._pending += self._decoder.push(token)
        if (end := self._find_stop()) is not None:
            self._pending = self._pending[:end]
            return self._finish("stop", is_stop_string=True)
        if self.matcher is not None and self.matcher.is_stopped():
            return self._finish("stop")
        if self.n_left <= 0:
            return self._finish("length")
        self._release(len(self._pending) - self._held_back())

    def cancel(self) -> None:
        """End now, with the text so far."""
        if self.finish_reason is None:
            self._finish("cancelled")

    def fail(self, error: Exception) -> None:
        """End now, with an error instead of a result."""
        self.error = error
        self.finish_reason = "error"

    def read(self) -> Piece:
        """What came since the last call.

        Raises:
            Exception: what made it fail.
        """
        if self.error is not None:
            raise self.error
        ids, first = self.token_ids, self._n_read
        piece = Piece(
            self.text[self._n_chars_read :],
            tuple(ids[first:]),
            tuple(self.logprobs[first:]) if self.params.logprobs else (),
            tuple(self.top_logprobs[first:]) if self.params.top_logprobs else (),
            self.finish_reason,
            min(self.n_reused, self.n_prompt),
        )
        self._n_read, self._n_chars_read = len(ids), len(self.text)
        return piece

    def _finish(self, reason: str, is_stop_string: bool = False) -> None:
        self.finish_reason = reason
        if not is_stop_string:
            self._pending += self._decoder.flush()
            if (end := self._find_stop()) is not None:
                self._pending, self.finish_reason = self._pending[:end], "stop"
        self._release(len(self._pending))

    def _release(self, n_chars: int) -> None:
        self.text += self._pending[:n_chars]
        self._pending = self._pending[n_chars:]

    def _find_stop(self) -> int | None:
        """Where the first stop string begins in the pending text."""
        found = [at for text in self.params.stop if (at := self._pending.find(text)) >= 0]
        return min(found, default=None)

    def _held_back(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = 0
        for stop in self.params.stop:
            for length in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:length]):
                    longest = length
                    break
        return longest
