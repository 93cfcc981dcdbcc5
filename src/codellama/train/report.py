"""The stages of a recipe side by side: what is trained, and how well it predicts held-out text."""

from __future__ import annotations

from codellama.recipe import Recipe
from codellama.rows import read_rows
from codellama.train.metrics import METRICS_FILE


def stage_table(recipe: Recipe) -> list[dict[str, str]]:
    """One row a stage: its checkpoint, steps, tokens and last validation in bits a byte."""
    rows: list[dict[str, str]] = []
    for name in recipe.stage_order():
        folder = recipe.run_dir(name)
        metrics = read_rows(folder / METRICS_FILE)
        steps = [row for row in metrics if "loss" in row]
        last = {
            key.removeprefix("validation_bits_per_byte").removeprefix("_") or "all": f"{value:.4f}"
            for row in metrics
            for key, value in row.items()
            if key.startswith("validation_bits_per_byte")
        }
        is_done = (folder / "checkpoint").is_dir()
        rows.append(
            {
                "stage": name,
                "from": recipe.stages[name].init,
                "step": f"{steps[-1]['step'] if steps else 0} of {recipe.stages[name].steps}",
                "tokens": f"{steps[-1]['tokens']:,}" if steps else "0",
                "bits a byte": "  ".join(f"{kind} {value}" for kind, value in last.items()),
                "checkpoint": str(folder / "checkpoint") if is_done else "",
            }
        )
    return rows
