"""What a caller may ask of generation, checked before anything is computed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

MAX_TOKENS = 2**31 - 1
MAX_STOPS, MAX_STOP_CHARS = 128, 256  # looked for at every token, while the batch waits
MAX_BIAS = 100  # what OpenAI's interface allows; a logit so far from the others decides
_WHOLE = {
    "max_tokens": (0, MAX_TOKENS),
    "top_k": (0, MAX_TOKENS),
    "n": (1, 1024),
    "top_logprobs": (0, 20),  # as there
}
_NUMBERS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-MAX_BIAS, MAX_BIAS),
    "frequency_penalty": (-MAX_BIAS, MAX_BIAS),
    "repetition_penalty": (0.01, 100),
}


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued.

    temperature 0 is greedy. top_p keeps the most likely tokens up to that probability, and always
    the first; top_k keeps that many, 0 all. The same seed gives the same text whatever else is in
    the batch; None draws one. stop strings end the text and are not part of it.

    Before that, a token that stands in prompt or text has a positive logit divided by
    repetition_penalty and a negative one multiplied; frequency_penalty is subtracted for each time
    it was generated and presence_penalty once; logit_bias adds to the logits of ids. schema, a JSON
    schema as text, allows only what conforms to it; "{}" is any object; regex, in its place, only
    what matches as a whole. min_p drops tokens less likely than that share of the most likely one,
    after temperature. best_of texts are written, of which the n with the highest log-probability a
    token are given. prompt_logprobs asks for those of the prompt too.

    Raises:
        ValueError: a value outside its range; names it and the range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    """So many of the most likely ids at each token, with their log-probabilities."""
    schema: str | None = None
    regex: str | None = None
    best_of: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name, (low, high) in (_WHOLE | _NUMBERS).items():
            value = getattr(self, name)
            is_right = _is_whole(value) if name in _WHOLE else _is_number(value)
            if not is_right or not low <= value <= high:
                kind = "a whole number" if name in _WHOLE else "a number"
                raise ValueError(f"{name} = {value!r}: expected {kind} in [{low}, {high}]")
        if self.seed is not None and not _is_whole(self.seed):
            raise ValueError(f"seed = {self.seed!r}: expected a whole number or None")
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise ValueError("logit_bias: expected each token id once")
        for token, bias in self.logit_bias:
            if not _is_whole(token) or token < 0 or not _is_number(bias) or abs(bias) > MAX_BIAS:
                raise ValueError(
                    f"logit_bias of {token!r} = {bias!r}: expected a token id and a number in "
                    f"[{-MAX_BIAS}, {MAX_BIAS}]"
                )
        if self.schema is not None:
            try:
                is_object = isinstance(json.loads(self.schema), dict)
            except (TypeError, ValueError, RecursionError):
                is_object = False
            if not is_object:
                raise ValueError(f"schema = {str(self.schema)[:80]!r}: expected a JSON object")
        if self.regex is not None and (self.schema is not None or not isinstance(self.regex, str)):
            raise ValueError(f"regex = {self.regex!r}: expected a text, and no schema beside it")
        if self.best_of is not None and not (
            _is_whole(self.best_of) and self.n <= self.best_of <= _WHOLE["n"][1]
        ):
            raise ValueError(f"best_of = {self.best_of!r}: expected n = {self.n} or more")
        if len(stop) > MAX_STOPS:
            raise ValueError(f"stop: expected at most {MAX_STOPS} texts, got {len(stop)}")
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                expected = f"texts of 1 to {MAX_STOP_CHARS} characters"
                raise ValueError(f"stop = {str(text)[:80]!r}: expected {expected}")

    def split(self) -> list[SamplingParams]:
        """The settings of each text that is written; each has a seed of its own."""
        n_written, logprobs = self.best_of or self.n, self.logprobs or self.best_of is not None
        if n_written == 1:
            return [self]
        seeds = [None if self.seed is None else self.seed + i for i in range(n_written)]
        return [replace(self, n=1, best_of=None, seed=s, logprobs=logprobs) for s in seeds]

    @property
    def has_penalties(self) -> bool:
        """Whether what was written already changes what follows."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1)

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the model decides how likely a token is."""
        return self.has_penalties or bool(self.logit_bias) or self.has_grammar

    @property
    def has_grammar(self) -> bool:
        """Whether only some texts are allowed."""
        return self.schema is not None or self.regex is not None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
