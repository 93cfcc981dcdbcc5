"""What a caller may ask of generation, checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued.

    temperature 0 is greedy. top_p keeps the most likely tokens up to that probability, and always
    the first; top_k keeps that many, 0 all. The same seed gives the same text whatever else is in
    the batch; None draws one. stop strings end the text and are not part of it.

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

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name, low, high in (
            ("max_tokens", 0, MAX_TOKENS),
            ("top_k", 0, MAX_TOKENS),
            ("n", 1, 1024),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} = {value!r}: expected a whole number in [{low}, {high}]")
        if self.seed is not None and (
            not isinstance(self.seed, int) or isinstance(self.seed, bool)
        ):
            raise ValueError(f"seed = {self.seed!r}: expected a whole number or None")
        for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0)):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not is_number or not low <= value <= high:
                raise ValueError(f"{name} = {value!r}: expected a number in [{low:g}, {high:g}]")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop = {text!r}: expected texts that are not empty")
