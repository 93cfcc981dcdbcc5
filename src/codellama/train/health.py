"""Which updates are not taken: a gradient that is no number, or a step far out of the ordinary.

Large runs skip such a step, and after several in a row go back to an earlier state and on behind
the data that led there. What is ordinary is judged by the last steps that were taken.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

WINDOW_STEPS = 128
MIN_STEPS = 32  # before so many, a deviation says nothing


class Health:
    """Judges each step by its loss and gradient norm before the weights change.

    Args:
        max_sigmas: standard deviations above the mean of the window from which a step is a spike;
            None looks for values that are not finite only.
    """

    def __init__(self, max_sigmas: float | None) -> None:
        self._max_sigmas = max_sigmas
        self._losses: list[float] = []
        self._norms: list[float] = []
        self.n_skipped = 0
        """Steps in a row that were not taken."""

    def judge(self, loss: float, norm: float) -> str | None:
        """Why this step must not be taken; None where nothing is wrong with it."""
        reason = self._reason(loss, norm)
        if reason is not None:
            self.n_skipped += 1
            return reason
        self.n_skipped = 0
        for values, value in ((self._losses, loss), (self._norms, norm)):
            values.append(value)
            del values[:-WINDOW_STEPS]
        return None

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return f"gradient norm is {norm}, loss {loss}"
        if self._max_sigmas is None or len(self._losses) < MIN_STEPS:
            return None
        for name, values, value in (
            ("loss", self._losses, loss),
            ("gradient norm", self._norms, norm),
        ):
            mean, sigma = statistics.fmean(values), statistics.pstdev(values)
            if value > mean + self._max_sigmas * sigma:
                sigmas = (value - mean) / sigma if sigma else math.inf
                return f"{name} {value:.4g} is {sigmas:.1f} standard deviations above {mean:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike."""
        lists = {"losses": list(self._losses), "norms": list(self._norms)}  # they go on changing
        return {**lists, "n_skipped": self.n_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the run that `state_dict` was taken of."""
        self._losses, self._norms = list(state["losses"]), list(state["norms"])
        self.n_skipped = state["n_skipped"]
