"""Train states: all that a run needs to continue to the bit, written whole and checked on reading.

Folder RUN/states/step-NNNNNNNN: tensors.safetensors (weights, both moments, random state),
manifest.json (step, position of the
loader and what else is not a tensor) and SHA256SUMS (of these two, as `sha256sum` writes and checks
it). A state that is damaged is named and passed over in favour of the one before it.
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

from codellama.artifact import MANIFEST, new_folder, read_manifest, sha256_file, write_manifest

_TENSORS = "tensors.safetensors"
_SUMS = "SHA256SUMS"


def save_state(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
    keep: int,
) -> None:
    """Write the state behind `step` steps, then delete all but the newest `keep` states.

    States of later steps are deleted too: a run is at `step` again only because they are damaged.

    Raises:
        OSError: it cannot be written; older states are untouched.
    """
    folder = run_dir / "states" / f"step-{step:08d}"
    learned = _learned(model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in learned.items()}
    for name, parameter in learned.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    tensors["rng"] = torch.get_rng_state()
    with new_folder(folder) as temporary:
        try:
            save_file(tensors, temporary / _TENSORS)
        except SafetensorError as error:
            raise OSError(f"{folder / _TENSORS}: cannot be written: {error}") from None
        write_manifest(temporary, "train-state", step=step, position=position)
        (temporary / _SUMS).write_text(_checksums(temporary), encoding="utf-8")
    folders = _state_folders(run_dir)
    for old in folders[folders.index(folder) + keep :] + folders[: folders.index(folder)]:
        shutil.rmtree(old, ignore_errors=True)


def load_latest_state(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]] | None:
    """Restore model and optimiser from the newest undamaged state.

    Returns:
        (step, position), or None where there is no state at all.

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
        return manifest["step"], manifest["position"]
    if folders:
        raise ValueError(
            f"{run_dir / 'states'}: every train state is damaged; delete the folder to start again"
        )
    return None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a state into memory once its checksums hold."""
    try:
        # Bytes: a flipped bit may leave no text.
        if (folder / _SUMS).read_bytes() != _checksums(folder).encode():
            raise ValueError(f"{folder}: damaged: a file does not have the checksum in {_SUMS}")
        return read_manifest(folder, "train-state"), load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged: {error}") from None


def _checksums(folder: Path) -> str:
    return "".join(f"{sha256_file(folder / name)}  {name}\n" for name in (MANIFEST, _TENSORS))


def _restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Copy a state's tensors into a model and its optimiser."""
    torch.set_rng_state(tensors["rng"])
    with torch.no_grad():
        for name, parameter in _learned(model).items():
            parameter.copy_(tensors[f"model.{name}"])
            # Clones: the file's tensors are mapped to a file that will be deleted. There are none
            # where every step so far was skipped.
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes; frozen ones come from the stage's `init` again."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _state_folders(run_dir: Path) -> list[Path]:
    """State folders, newest first."""
    return sorted((run_dir / "states").glob("step-*"), reverse=True)
