"""Train states: all that a run needs to continue to the bit, written whole and checked on reading.

Folder RUN/states/step-NNNNNNNN: tensors.safetensors (weights, both moments, random state),
manifest.json (step, position of the loader and what else is not a tensor) and SHA256SUMS (of these,
as `sha256sum` writes and checks it). Several processes write a file of tensors each. A state that
is damaged is named and passed over in favour of the one before it.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from codellama.artifact import MANIFEST, new_folder, read_manifest, sha256_file, write_manifest
from codellama.train.optim import Optimizer
from codellama.train.parallel import ALONE, Layout, from_main

_TENSORS = "tensors.safetensors"  # of one process; several write a file each
_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
_SUMS = "SHA256SUMS"


class StateWriter:
    """Writes train states of one run in a thread, from copies, so that training goes on meanwhile.

    One at a time: the next one waits for the one before. It also deletes all but the newest `keep`,
    and the states of later steps: a run is at a step again only because they are damaged. Every
    rank has one and calls it alike; each writes what it holds.
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
        self, step: int, model: nn.Module, optimizer: Optimizer, position: dict[str, Any]
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
                if layout.is_alone:
                    _save_whole(tensors, target / _TENSORS)
                else:
                    _save_parts(tensors, target, group)
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


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What a run has learned so far, by name; parts of tensors where ranks share them."""
    learned = _learned(model)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in learned.items()}
    for name, parameter in learned.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    return tensors


def _save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None


def _save_parts(tensors: dict[str, Tensor], folder: Path, group: Any) -> None:
    """Each rank writes its parts, as safetensors with their places in the header."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder}: cannot be written: {reason}") from None


def load_latest_state(
    run_dir: Path,
    model: nn.Module,
    optimizer: Optimizer,
    layout: Layout = ALONE,
) -> tuple[int, dict[str, Any]] | None:
    """Restore model and optimiser from the newest undamaged state, whatever wrote it.

    Returns:
        (step, position), or None where there is no state at all.

    Raises:
        ValueError: there are states, and every one of them is damaged.
    """
    found = from_main(_newest(run_dir) if layout.is_main else None, layout)
    if isinstance(found, ValueError):
        raise found
    if found is None:
        return None
    folder, manifest = found
    if layout.is_alone and (folder / _TENSORS).exists():
        _restore(load_file(folder / _TENSORS), model, optimizer)
    else:
        _restore_parts(folder, model, optimizer, layout)
    return manifest["step"], manifest["position"]


def _newest(run_dir: Path) -> tuple[Path, dict[str, Any]] | ValueError | None:
    """The newest folder whose checksums hold; an error where none of several does."""
    folders = _state_folders(run_dir)
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


def _restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Copy a state's tensors into a model and its optimiser."""
    if "rng" in tensors:
        torch.set_rng_state(tensors["rng"])
    with torch.no_grad():
        for name, parameter in _learned(model).items():
            parameter.copy_(tensors[f"model.{name}"])
            # Clones: the file's tensors are mapped to a file that will be deleted. There are none
            # where every step so far was skipped.
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device, copy=True)
                for key in _MOMENTS
                if f"{key}.{name}" in tensors
            }


def _restore_parts(folder: Path, model: nn.Module, optimizer: Optimizer, layout: Layout) -> None:
    """Read what this rank holds of each tensor, however the ranks that wrote it were laid out."""
    reader = HuggingFaceStorageReader(str(folder))
    written = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, parameter in _learned(model).items():
        tensors[f"model.{name}"] = torch.empty_like(parameter)
        for key in _MOMENTS:
            if f"{key}.{name}" in written:
                is_count = key == "step"
                tensors[f"{key}.{name}"] = (
                    torch.zeros(()) if is_count else torch.empty_like(parameter)
                )
    state_dict_loader.load(tensors, storage_reader=reader, no_dist=layout.is_alone)
    _restore(tensors, model, optimizer)


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes; frozen ones come from the stage's `init` again."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _state_folders(run_dir: Path) -> list[Path]:
    """State folders, newest first."""
    return sorted((run_dir / "states").glob("step-*"), reverse=True)
