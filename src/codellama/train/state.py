"""Train states: all that a run needs to continue to the bit, written whole and checked on reading.

Folder RUN/states/step-NNNNNNNN: tensors.safetensors (weights, both moments, random state),
manifest.json (step, position of the loader and what else is not a tensor) and SHA256SUMS (of these,
as `sha256sum` writes and checks it). Several processes write a file of tensors each. A state that
is damaged is named and passed over in favour of the one before it.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import hf_storage, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from codellama.artifact import MANIFEST, new_folder, read_manifest, sha256_file, write_manifest
from codellama.train.parallel import ALONE, Layout, from_main

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_SUMS = "SHA256SUMS"


class StateWriter:
    """Writes the states of one run in a thread, from copies; the next waits for the one before.

    Then deletes all but the newest `keep`, and those of later steps: a run is at a step again only
    because they are damaged. Every rank has one and calls it alike; each writes what it holds.
    """

    def __init__(self, run_dir: Path, keep: int, layout: Layout = ALONE) -> None:
        self._run_dir = run_dir
        self._keep = keep
        self._layout = layout
        # Of its own, so that what its ranks say to each other does not mix with training.
        self._group = None if layout.is_alone else dist.new_group(backend="gloo")
        self._executor = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def start(
        self, step: int, model: nn.Module, optimizer: torch.optim.AdamW, position: dict[str, Any]
    ) -> None:
        """Begin to write the state behind `step` steps; `position` must not change any more.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        tensors = {
            name: tensor.to("cpu", copy=True) for name, tensor in _tensors(model, optimizer).items()
        }
        if self._layout.is_alone:
            tensors["rng"] = torch.get_rng_state()
        self._pending = self._executor.submit(self._write, step, tensors, position)

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            OSError: the last state could not be written; older ones are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
        folder = self._run_dir / "states" / f"step-{step:08d}"
        layout, group = self._layout, self._group
        error: OSError | None = None
        try:
            with ExitStack() as stack:
                target: Any = None
                if layout.is_main:
                    try:
                        target = stack.enter_context(new_folder(folder))
                    except OSError as raised:
                        target = raised
                target = from_main(target, layout, group)
                if isinstance(target, OSError):
                    raise target
                _save(tensors, target, group)
                if layout.is_main:
                    write_manifest(target, "train-state", step=step, position=position)
                    (target / _SUMS).write_text(_checksums(target), encoding="utf-8")
        except OSError as raised:
            error = raised
        if (error := from_main(error, layout, group)) is not None:  # all ranks fail, or none
            raise OSError(f"train state of step {step} not saved: {error}")
        if layout.is_main:
            folders = _state_folders(self._run_dir)
            place = folders.index(folder)
            for old in folders[place + self._keep :] + folders[:place]:
                shutil.rmtree(old, ignore_errors=True)


def _tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What a run has learned so far, by name; parts of tensors where ranks share them."""
    learned = _learned(model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in learned.items()}
    for name, parameter in learned.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    return tensors


def _save(tensors: dict[str, Tensor], folder: Path, group: Any) -> None:
    """Write what this rank holds; several write a file each, with places in its header."""
    try:
        if group is None:
            save_file(tensors, folder / "tensors.safetensors")
        else:
            writer = hf_storage.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except SafetensorError as error:
        raise OSError(f"{folder}: cannot be written: {error}") from None
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder}: cannot be written: {reason}") from None


def load_latest_state(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW | None = None,
    layout: Layout = ALONE,
    step: int | None = None,
) -> tuple[int, dict[str, Any]] | None:
    """Restore model and optimiser from the newest undamaged state, whatever wrote it.

    Args:
        optimizer: None restores the weights only.
        step: take the state behind this one only.

    Returns:
        (step, position), or None where there is no state at all.

    Raises:
        ValueError: there are states, and every one of them is damaged.
    """
    found = from_main(_newest(run_dir, step) if layout.is_main else None, layout)
    if isinstance(found, ValueError):
        raise found
    if found is None:
        return None
    folder, manifest = found
    _restore(folder, model, optimizer, layout)
    return manifest["step"], manifest["position"]


def _newest(run_dir: Path, step: int | None) -> tuple[Path, dict[str, Any]] | ValueError | None:
    """The newest folder whose checksums hold; an error where none of several does."""
    folders = _state_folders(run_dir)
    if step is not None:
        folders = [folder for folder in folders if folder.name == f"step-{step:08d}"]
    for folder in folders:
        try:
            # Bytes: a flipped bit may leave no text.
            if (folder / _SUMS).read_bytes() != _checksums(folder).encode():
                raise ValueError(f"{folder}: damaged: a file does not have the checksum in {_SUMS}")
            return folder, read_manifest(folder, "train-state")
        except (OSError, ValueError) as error:
            reason = f"{folder}: damaged: {error}" if isinstance(error, OSError) else str(error)
            print(f"warning: {reason}; trying the state before it", file=sys.stderr)
    if folders:
        return ValueError(
            f"{run_dir / 'states'}: every train state is damaged; delete the folder to start again"
        )
    return None


def _checksums(folder: Path) -> str:
    names = [MANIFEST, *sorted(path.name for path in folder.glob("*.safetensors"))]
    return "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names)


def _restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.AdamW | None, layout: Layout
) -> None:
    """Read what this rank holds of each tensor, however the ranks that wrote it were laid out."""
    reader = hf_storage.HuggingFaceStorageReader(str(folder))
    written = reader.read_metadata().state_dict_metadata
    learned = _learned(model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in learned.items()}
    if optimizer is not None:
        for name, parameter in learned.items():
            # Every rank counts all steps; no moments where every step so far was skipped.
            moments = {
                key: torch.zeros(()) if key == "step" else torch.empty_like(parameter.detach())
                for key in _MOMENTS
                if f"{key}.{name}" in written
            }
            tensors |= {f"{key}.{name}": tensor for key, tensor in moments.items()}
            optimizer.state[parameter] = moments
        if layout.is_alone and "rng" in written:
            tensors["rng"] = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=layout.is_alone)
    if "rng" in tensors:
        torch.set_rng_state(tensors["rng"])


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes; frozen ones come from the stage's `init` again."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _state_folders(run_dir: Path) -> list[Path]:
    """State folders, newest first."""
    return sorted((run_dir / "states").glob("step-*"), reverse=True)
