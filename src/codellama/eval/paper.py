"""Numbers of the Code Llama paper and of others it quotes, to stand beside ours.

Source: arXiv 2308.12950 version 3; paper.txt holds the tables whose problems we have. Models are
named by size and variant, `7b`, `7b-python`, `7b-instruct`; those of others with dashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Numbers by measure and model; each table of the file ends with an empty line."""
    numbers: dict[str, dict[str, float]] = {}
    measures: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line:
            measures = []
        elif not measures:
            measures = [] if line.startswith("#") else line.split()
        else:
            model, *cells = line.split()
            for measure, cell in zip(measures, cells, strict=True):
                if cell != "-":
                    numbers.setdefault(measure, {})[model] = float(cell)
    return numbers


PUBLISHED = _read(Path(__file__).with_suffix(".txt"))
_SIZES = {"7b": 7e9, "13b": 13e9, "34b": 34e9, "70b": 70e9}


def nearest_model(model: Mapping[str, Any]) -> str:
    """The released model that is nearest in size, of the same kind: instruct, Python or base."""
    n_parameters = model.get("n_parameters", 0)
    size = min(_SIZES, key=lambda name: abs(_SIZES[name] - n_parameters))
    if model.get("is_instruct"):
        return f"{size}-instruct"
    return f"{size}-python" if "python" in model.get("name", "").lower() else size


def published(task: str, metric: str, model: str, group: str = "") -> float | None:
    """The paper's number for a model, in percent; None where it has none."""
    measure = f"{task}/{group}:{metric}" if group else f"{task}:{metric}"
    return PUBLISHED.get(measure, {}).get(model)


def others(task: str, metric: str) -> dict[str, float]:
    """Numbers that the paper quotes for models other than Code Llama, in percent."""
    numbers = PUBLISHED.get(f"{task}:{metric}", {})
    return {
        name: number for name, number in numbers.items() if name[0].isupper() or "cushman" in name
    }
