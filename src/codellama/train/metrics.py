"""What a run reports: JSON lines, a loss curve, and speed against what the machine can do.

Files out, in the run folder: metrics.jsonl (one object a step), loss.png.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from codellama.artifact import write_file

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


def matrix_flops_per_s(device: str, dtype: torch.dtype, width: int = 2048) -> float:
    """The machine's own rate at a large square matrix product: what MFU is measured against."""
    a = torch.randn(width, width, device=device).to(dtype)
    durations = []
    for _ in range(8):
        begin = time.perf_counter()
        _ = a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - begin)
    return 2 * width**3 / statistics.median(durations[2:])  # the first ones warm up


class MetricsLog:
    """Appends to metrics.jsonl; a resumed run first drops what its state does not cover."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._path = run_dir / METRICS_FILE
        kept = [row for row in read_metrics(run_dir) if row["step"] <= first_step]
        write_file(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; it reaches the file at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run; a last line that a kill cut off is left out."""
    path = run_dir / METRICS_FILE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curve(run_dir: Path) -> None:
    """Draw training loss, validation loss and learning rate over the steps as loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(run_dir)
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    if not steps:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    x, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
    axes.plot(x, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(x, _smooth(losses), color="tab:blue", label="training")
    if validations:
        points = [row["step"] for row in validations], [r["validation_loss"] for r in validations]
        axes.plot(*points, "o-", color="tab:orange", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_ylim(top=min(max(losses), 1.5 * sorted(losses)[len(losses) // 2]))
    axes.legend()
    rates = axes.twinx()
    rates.plot(x, [row["lr"] for row in steps], color="gray", linewidth=0.8, linestyle="--")
    rates.set_ylabel("learning rate")
    temporary = run_dir / f".{CURVE_FILE}.tmp"
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(run_dir / CURVE_FILE)


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """An exponential mean, corrected for its start."""
    mean, total, out = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(mean / total)
    return out
