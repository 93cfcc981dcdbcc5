"""The progress of a run on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINE_EVERY_S = 30


class Progress:
    """Shows steps done, loss, tokens/s, MFU and the time left."""

    def __init__(self, n_steps: int, first_step: int, is_main: bool = True) -> None:
        self._is_main = is_main
        console = Console(file=sys.stderr)
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn()
        facts = TextColumn("{task.fields[facts]}"), TimeRemainingColumn()
        is_hidden = not (is_main and console.is_terminal)
        self._bar = Bar(*columns, *facts, console=console, disable=is_hidden)
        self._task = self._bar.add_task("", total=n_steps, completed=first_step, facts="")
        self._n_steps = n_steps
        self._first = (first_step, time.monotonic())
        self._last_line = 0.0

    def update(self, row: dict[str, Any]) -> None:
        """Show the metrics of one step."""
        facts = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  MFU {row['mfu']:.1%}"
        self._bar.update(self._task, completed=row["step"], facts=facts)
        now = time.monotonic()
        if self._is_main and self._bar.disable and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            step, begin = self._first
            left_s = (now - begin) / max(1, row["step"] - step) * (self._n_steps - row["step"])
            place = f"step {row['step']}/{self._n_steps}"
            print(f"{place}  {facts}  {left_s / 60:.0f} min left", file=sys.stderr, flush=True)

    def note(self, step: int, result: dict[str, float]) -> None:
        """Print a validation result."""
        if self._is_main:
            facts = "  ".join(f"{name} {value:.4f}" for name, value in result.items())
            self._bar.console.print(f"step {step}  {facts}", highlight=False)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
