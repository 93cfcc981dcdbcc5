"""What a run reports: JSON lines, a loss curve, and speed against what the machine can do.

Files out, in the run folder: metrics.jsonl (one object a step), loss.png.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from codellama.rows import read_rows, write_rows

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


def matrix_flops_per_s(device: str, dtype: torch.dtype, width: int = 2048) -> float:
    """The machine's own rate at a large square matrix product: what MFU is measured against."""
    generator = torch.Generator(device).manual_seed(0)  # training's random state stays as it is
    a = torch.randn(width, width, device=device, generator=generator).to(dtype)
    durations: list[float] = []
    while len(durations) < 3 or (sum(durations) < 1 and len(durations) < 8):
        begin = time.perf_counter()
        _ = a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - begin)
    return 2 * width**3 / statistics.median(durations[1:])  # the first one warms up


class MetricsLog:
    """Appends to metrics.jsonl; a resumed run first drops what its state does not cover.

    A file that cannot be written to is a warning: training does not depend on it.

    Args:
        tensorboard: write the same to the folder `tensorboard`, too.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(
        self, run_dir: Path, first_step: int, is_main: bool = True, tensorboard: bool = False
    ) -> None:
        self._path = run_dir / METRICS_FILE
        self._file: FileIO | None = None
        self._pending = b""
        self._has_warned = False
        self._board: Any = None
        self._has_board = tensorboard
        if is_main:  # of the processes of a run one writes
            self._open(first_step)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; it reaches the file at once, or with a later one. NaN becomes null."""
        if self._file is None:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        if self._board is not None:
            for key, value in finite.items():
                if key != "step" and value is not None:
                    self._board.add_scalar(key, value, row["step"])
        self._pending += json.dumps(finite).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._has_warned:
                print(f"warning: {self._path}: {error}; training goes on", file=sys.stderr)
            self._has_warned = True

    def rewind(self, step: int) -> None:
        """Drop what was written of the steps after this one."""
        if self._file is not None:
            self.close()
            self._open(step)

    def _open(self, step: int) -> None:
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        write_rows(self._path, kept)
        self._pending = b""
        self._file = FileIO(self._path, "ab")
        if self._has_board:
            self._board = _board(self._path.parent / "tensorboard", step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer behind a step; what it holds of later ones is no longer shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard: TensorBoard is not installed; pip install 'codellama[watch]'"
        ) from None
    return SummaryWriter(folder, purge_step=step + 1)


def draw_curve(run_dir: Path) -> None:
    """Draw training loss, validation loss and learning rate over the steps as loss.png.

    Raises:
        OSError: it cannot be written.
    """
    rows = read_rows(run_dir / METRICS_FILE)
    steps = [row for row in rows if row.get("loss") is not None]
    if not steps:
        return
    with _figure(run_dir / CURVE_FILE) as axes:
        x, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
        axes.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        _plot_losses(axes, rows, "step", "", "tab:blue", "tab:orange")
        axes.set(xlabel="step")
        axes.set_ylim(top=min(max(losses), 1.5 * sorted(losses)[len(losses) // 2]))
        rates = axes.twinx()
        rates.plot(x, [row["lr"] for row in steps], color="gray", linewidth=0.8, linestyle="--")
        rates.set_ylabel("learning rate")


def draw_comparison(run_dirs: Sequence[Path], target: Path) -> None:
    """Draw the losses of several runs over the tokens that they have seen.

    Raises:
        ValueError: a run has taken no step yet.
        OSError: the file cannot be written.
    """
    with _figure(target) as axes:
        for i, run_dir in enumerate(run_dirs):
            rows = read_rows(run_dir / METRICS_FILE)
            if not any(row.get("loss") is not None for row in rows):
                raise ValueError(f"{run_dir}: no step was taken yet")
            _plot_losses(axes, rows, "tokens", f"{run_dir} ", f"C{i}", f"C{i}")
        axes.set(xlabel="tokens")


@contextmanager
def _figure(target: Path) -> Iterator[Any]:
    """Axes to draw on; the picture is written whole when they are left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    try:
        yield axes
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
        temporary = target.with_name(f".{target.name}.tmp")
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(target)
    finally:
        pyplot.close(figure)


def _plot_losses(
    axes: Any, rows: list[dict[str, Any]], over: str, name: str, color: str, held_out_color: str
) -> None:
    """The smoothed training loss, and the validation losses as points."""
    steps = [row for row in rows if row.get("loss") is not None]
    losses = _smooth([row["loss"] for row in steps])
    axes.plot([row[over] for row in steps], losses, color=color, label=f"{name}training")
    place = {row["step"]: row[over] for row in steps}
    points = [
        (place[row["step"]], row["validation_loss"])
        for row in rows
        if row.get("validation_loss") is not None and row["step"] in place
    ]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=held_out_color, markersize=3, label=f"{name}validation")


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """An exponential mean, corrected for its start."""
    mean, total, out = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(mean / total)
    return out
