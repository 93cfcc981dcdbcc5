"""A checkpoint of a train state: for looking at a run before its end, or at an earlier moment."""

from __future__ import annotations

from pathlib import Path

from codellama.model.checkpoint import save_checkpoint
from codellama.model.lora import merged_state
from codellama.recipe import Recipe
from codellama.train.parallel import fill
from codellama.train.start import initial_model, stage_tokenizer
from codellama.train.state import load_latest_state


def export_state(recipe: Recipe, stage_name: str, target: Path, step: int | None = None) -> int:
    """Write the weights of a stage's train state, however many processes wrote it.

    Returns:
        The step of the state, by default of the newest undamaged one.

    Raises:
        ValueError: there is no such state, it is damaged, or `target` exists.
    """
    stage, folder = recipe.stage(stage_name), recipe.run_dir(stage_name)
    if target.exists():
        raise ValueError(f"{target}: exists already; nothing was written")
    tokenizer = stage_tokenizer(recipe, stage)
    model, read = initial_model(recipe, stage, tokenizer)
    fill(model, read, "cpu")  # a state has only what learns
    found = load_latest_state(folder, model, step=step)
    if found is None:
        wanted = "train state" if step is None else f"train state of step {step}"
        raise ValueError(f"{folder / 'states'}: no {wanted}")
    weights = model.state_dict()
    if stage.lora is not None:
        weights = merged_state(weights, stage.lora)
    save_checkpoint(target, model.config, weights, stage.dtype, write_more=tokenizer.save)
    return found[0]
