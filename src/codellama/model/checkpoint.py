"""The checkpoint folder: a model as Hugging Face lays it out, so that other tools open it.

Folder:
    config.json, generation_config.json
    model.safetensors, or model-0000i-of-0000n.safetensors and model.safetensors.index.json
    tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json

Read, never written: the older pytorch_model.bin, whole or in parts with an index.

Loading maps the files into memory and is strict: a missing, extra or misshaped tensor is an error
that names it. Other layouts are read by meta.py and gguf.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codellama.artifact import new_folder
from codellama.model.config import ModelConfig
from codellama.model.quantize import SCALES, Int4Linear, Int8Linear, restored
from codellama.model.source import (
    DTYPES,
    Stored,
    Weights,
    build_model,
    check_names,
    inside,
    read_json,
    short,
    tensor_shapes,
)
from codellama.model.torch_files import read_torch_file
from codellama.model.transformer import Transformer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"
# A table that old versions of Transformers saved; it follows from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


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
    wanted = tensor_shapes(config)
    check_names(str(folder), wanted, set(tensors))
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                f"but the configuration asks for {wanted[name]}"
            )
    item_bytes = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    sizes = {name: tensor.numel() * item_bytes for name, tensor in tensors.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    with new_folder(folder) as temporary:
        for filename, names in shards.items():
            contents = {n: tensors[n].detach().to(DTYPES[dtype]).contiguous() for n in names}
            try:
                save_file(contents, temporary / filename, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder / filename}: cannot be written: {error}") from None
        write_json_files(temporary, config, dtype, shards, sum(sizes.values()))
        if write_more:
            write_more(temporary)


def write_json_files(
    folder: Path,
    config: ModelConfig,
    dtype: str,
    shards: dict[str, list[str]],
    total_bytes: int,
    eos_ids: int | list[int] = 2,
    **more: Any,
) -> None:
    """Write the index (of several files), config.json and generation_config.json."""
    if len(shards) > 1:
        weight_map = {name: filename for filename, names in shards.items() for name in names}
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / INDEX_FILE, index)
    _write_json(folder / "config.json", config.to_hf() | {"torch_dtype": dtype} | more)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": eos_ids})


def load_config(folder: str | Path) -> ModelConfig:
    """Read the model's shape from a checkpoint folder.

    Raises:
        ValueError: no such folder, no readable config.json, or not a Llama.
    """
    folder = Path(folder)
    try:
        values = read_json(inside(folder, "config.json"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a checkpoint folder: it has no config.json") from None
    try:
        return ModelConfig.from_hf(values)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def load_checkpoint(
    folder: str | Path, device: str = "cpu", dtype: str | None = "bfloat16"
) -> Transformer:
    """Load the model of a checkpoint folder.

    Weights that already have the wanted type stay mapped to the files until they are touched.

    Args:
        dtype: "bfloat16", "float16", "float32" or "int8"; None keeps what the files hold.

    Raises:
        ValueError: the folder is not a checkpoint, a file is damaged, or a tensor is missing, extra
            or misshaped; the message names it.
    """
    return build_model(open_checkpoint(folder), device, dtype)


def open_checkpoint(folder: str | Path) -> Weights:
    """Open a checkpoint folder, reading only the directories of its files.

    Raises:
        ValueError: the folder is not a checkpoint, or a file is missing or damaged.
    """
    folder = Path(folder)
    config = load_config(folder)
    tensors: dict[str, Stored] = {}
    mapped: dict[str, Tensor] = {}  # of .bin files
    for filename, expected in _weight_files(folder).items():
        path = inside(folder, filename)
        if filename.endswith(".bin"):
            contents = read_torch_file(path)
            mapped |= contents
            found = {name: _describe(path, name, tensor) for name, tensor in contents.items()}
        else:
            found = _read_directory(path)
        if expected is not None and found.keys() != expected:
            odd = sorted(found.keys() ^ expected)[0]
            raise ValueError(f"{path}: tensor {odd!r} disagrees with the index")
        twice = found.keys() & tensors.keys()
        if twice:
            raise ValueError(f"{path}: tensor {sorted(twice)[0]!r} is in two files")
        tensors |= found

    scales = _fold_scales(tensors, config)

    def layer(name: str) -> Int8Linear | Int4Linear:
        found, own = tensors[name], scales[name]
        weight, scale = (
            _read_tensor(Path(found.where), name),
            _read_tensor(Path(own[1].where), own[0]),
        )
        try:
            # Copies: aligned, and kernels for integers read beyond the end of a mapping.
            return restored(weight.clone(), scale.clone(), found.shape[1])
        except ValueError as error:
            raise ValueError(f"{found.where}: tensor {name!r}: {error}") from None

    def read(name: str, dtype: torch.dtype | None) -> Tensor:
        if name in scales:
            return layer(name).dequantized(dtype or torch.bfloat16)
        tensor = mapped[name] if name in mapped else _read_tensor(Path(tensors[name].where), name)
        return tensor if dtype is None else tensor.to(dtype)

    kept = {name: stored for name, stored in tensors.items() if not _DERIVED.fullmatch(name)}
    return Weights("hf", folder, config, kept, read, {}, layer)


def _fold_scales(tensors: dict[str, Stored], config: ModelConfig) -> dict[str, tuple[str, Stored]]:
    """Take the scales out of the tensors, for each matrix of integers, which becomes a matrix."""
    scales: dict[str, tuple[str, Stored]] = {}
    for name, stored in list(tensors.items()):
        if stored.dtype not in SCALES:
            continue
        own = name.removesuffix("weight") + SCALES[stored.dtype]
        if own not in tensors or len(stored.shape) != 2:
            raise ValueError(f"{stored.where}: tensor {name!r} holds integers but has no {own!r}")
        scales[name] = own, tensors.pop(own)
        n_in = config.intermediate_size if ".down_proj." in name else config.hidden_size
        n_bytes = stored.n_bytes + scales[name][1].n_bytes
        precision = "int8" if stored.dtype == torch.int8 else "int4"
        shape = (stored.shape[0], n_in)
        tensors[name] = Stored(shape, torch.bfloat16, precision, n_bytes, stored.where)
    return scales


def _describe(path: Path, name: str, tensor: Tensor) -> Stored:
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{path}: tensor {name!r} has type {short(tensor.dtype)}")
    shape = tuple(tensor.shape)
    return Stored(shape, tensor.dtype, short(tensor.dtype), tensor.nbytes, str(path))


def _read_directory(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, whose library checks all sizes and offsets."""
    tensors: dict[str, Stored] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(tensor.get_dtype())
                if dtype is None:
                    raise ValueError(f"{path}: tensor {name!r} has type {tensor.get_dtype()}")
                shape = tuple(tensor.get_shape())
                n_bytes = math.prod(shape) * dtype.itemsize
                tensors[name] = Stored(shape, dtype, short(dtype), n_bytes, str(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file: {error}") from None
    return tensors


def _read_tensor(path: Path, name: str) -> Tensor:
    # Opened for every tensor: the mapping then ends with the tensors that use it.
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: tensor {name!r} cannot be read: {error}") from None


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The weight files of a checkpoint; from an index, also the names that each must hold."""
    for single, index in ((SINGLE_FILE, INDEX_FILE), (BIN_FILE, BIN_INDEX_FILE)):
        if (folder / single).is_file():
            return {single: None}
        if (folder / index).is_file():
            break
    else:
        raise ValueError(
            f"{folder}: no weights: expected {SINGLE_FILE} or {INDEX_FILE} (or {BIN_FILE})"
        )
    weight_map = read_json(inside(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{folder / index}: 'weight_map' is missing or not an object")
    files: dict[str, set[str] | None] = {}
    for name, filename in weight_map.items():
        # A name with a folder in it could lead outside of the checkpoint.
        if (
            not isinstance(filename, str)
            or not filename.endswith(Path(single).suffix)
            or Path(filename).name != filename
        ):
            raise ValueError(
                f"{folder / index}: file {str(filename)[:200]!r} of tensor {name!r} is not the "
                f"plain name of a {Path(single).suffix} file"
            )
        names = files.setdefault(filename, set())
        assert names is not None
        names.add(name)
    return files


def plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
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
