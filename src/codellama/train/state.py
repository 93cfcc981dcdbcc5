"""Train states: all that a run needs to continue to the bit, written whole and checked on reading.

Folder RUN/states/step-NNNNNNNN: tensors.safetensors (weights, both moments, random state) and
manifest.json (step, loader state, checksum). A state that is damaged is named and passed over in
favour of the one before it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codellama.artifact import new_folder, read_manifest, sha256_file, write_manifest

_TENSORS = "tensors.safetensors"


def save_state(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader_state: dict[str, Any],
    keep: int,
) -> None:
    """Write the state behind `step` updates, then delete all but the newest `keep` states.

    Raises:
        OSError: it cannot be written; older states are untouched.
    """
    folder = run_dir / "states" / f"step-{step:08d}"
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    tensors["rng"] = torch.get_rng_state()
    with new_folder(folder) as temporary:
        try:
            save_file(tensors, temporary / _TENSORS)
        except SafetensorError as error:
            raise OSError(f"{folder / _TENSORS}: cannot be written: {error}") from None
        write_manifest(
            temporary,
            "train-state",
            step=step,
            loader=loader_state,
            sha256=sha256_file(temporary / _TENSORS),
        )
    for old in _state_folders(run_dir)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def load_latest_state(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]] | None:
    """Restore model and optimiser from the newest undamaged state.

    Returns:
        (step, loader state), or None where there is no state at all.

    Raises:
        ValueError: there are states, and every one of them is damaged.
    """
    folders = _state_folders(run_dir)
    for folder in folders:
        try:
            manifest, tensors = _read(folder)
        except ValueError as error:
            print(f"warning: {error}; trying the state before it", file=sys.stderr)
            continue
        _restore(tensors, model, optimizer)
        return manifest["step"], manifest["loader"]
    if folders:
        raise ValueError(
            f"{run_dir / 'states'}: every train state is damaged; delete the folder to start again"
        )
    return None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a state into memory once its checksum holds."""
    manifest = read_manifest(folder, "train-state")
    path = folder / _TENSORS
    try:
        if sha256_file(path) != manifest["sha256"]:
            raise ValueError(f"{path}: damaged: its checksum is not that of the manifest")
        return manifest, load_file(path)
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def _restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Copy a state's tensors into a model and its optimiser."""
    torch.set_rng_state(tensors["rng"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {
                "step": tensors[f"step.{name}"].to(torch.float32),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }


def _state_folders(run_dir: Path) -> list[Path]:
    """State folders, newest first."""
    return sorted((run_dir / "states").glob("step-*"), reverse=True)
