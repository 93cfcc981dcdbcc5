"""The checkpoint folder: a model as Hugging Face lays it out, so that other tools open it.

Folder:
    config.json, generation_config.json
    model.safetensors, or model-0000i-of-0000n.safetensors and model.safetensors.index.json
    tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json

Loading maps the files into memory and is strict: a missing, extra or misshaped tensor is an error
that names it. Nothing here unpickles. Other layouts are read by convert.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codellama.artifact import new_folder
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its Hugging Face name, with its shape."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        tensors: all weights by Hugging Face name; cast to `dtype` one shard at a time.
        write_more: called with the unfinished folder, to add tokenizer files and a model card.

    Raises:
        ValueError: tensors do not match the config.
        OSError: the folder cannot be written; what stood there before is untouched.
    """
    folder = Path(folder)
    _check_names(str(folder), tensor_shapes(config), {n: tuple(t.shape) for n, t in tensors.items()})
    item_bytes = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    sizes = {name: tensor.numel() * item_bytes for name, tensor in tensors.items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    with new_folder(folder) as temporary:
        for filename, names in shards.items():
            contents = {name: tensors[name].detach().to(DTYPES[dtype]).contiguous() for name in names}
            try:
                save_file(contents, temporary / filename, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder / filename}: cannot be written: {error}") from None
        if len(shards) > 1:
            weight_map = {name: filename for filename, names in shards.items() for name in names}
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            _write_json(temporary / INDEX_FILE, index)
        _write_json(temporary / "config.json", config.to_hf() | {"torch_dtype": dtype})
        _write_json(temporary / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        if write_more:
            write_more(temporary)


def load_config(folder: str | Path) -> ModelConfig:
    """Read the model's shape from a checkpoint folder.

    Raises:
        ValueError: no such folder, no readable config.json, or not a Llama.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return ModelConfig.from_hf(values)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent}: not a checkpoint folder: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_checkpoint(
    folder: str | Path, device: str = "cpu", dtype: str | None = "bfloat16"
) -> Transformer:
    """Load the model of a checkpoint folder.

    Weights that already have the wanted type stay mapped to the files until they are touched.

    Args:
        dtype: "bfloat16", "float16" or "float32"; None keeps what the files hold.

    Raises:
        ValueError: the folder is not a checkpoint, a file is damaged, or a tensor is missing, extra
            or misshaped; the message names it.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    config = load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for filename, name, tensor in _read_tensors(folder):
        if name in wanted and tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"{folder / filename}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"but config.json asks for {wanted[name]}"
            )
        target = tensor.dtype if dtype is None else DTYPES[dtype]
        tensors[name] = tensor.to(device=device, dtype=target)
    _check_names(str(folder), wanted, {name: tuple(t.shape) for name, t in tensors.items()})
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _read_tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (file, name, tensor) of every safetensors file of a checkpoint."""
    for filename, expected in _weight_files(folder).items():
        path = folder / filename
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if expected is not None and names != expected:
                    odd = sorted(names ^ expected)[0]
                    raise ValueError(f"{path}: tensor {odd!r} disagrees with {INDEX_FILE}")
                for name in sorted(names):
                    yield filename, name, file.get_tensor(name)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing, though {INDEX_FILE} names it") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or not a safetensors file: {error}") from None


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The weight files of a checkpoint; from an index, also the names that each must hold."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not index.is_file():
        raise ValueError(f"{folder}: no weights: expected {SINGLE_FILE} or {INDEX_FILE}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str] | None] = {}
        for name, filename in weight_map.items():
            # A name with a folder in it could lead outside of the checkpoint.
            if not isinstance(filename, str) or Path(filename).name != filename:
                raise ValueError(f"file name {filename!r} of tensor {name!r} is not a plain name")
            names = files.setdefault(filename, set())
            assert names is not None
            names.add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a weight index: {error}") from None
    return files


def _check_names(
    where: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """Compare tensor names and shapes, and name what differs."""
    for problem, names in (
        ("missing", [n for n in wanted if n not in found]),
        ("not part of this model", [n for n in found if n not in wanted]),
        ("of another shape", [n for n in wanted if n in found and found[n] != wanted[n]]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{where}: tensor {names[0]!r}{more} {problem}")


def _plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Fill files in the order of the names, each up to the limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
