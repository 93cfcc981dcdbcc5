"""Weights that lie in files of any format, seen as Hugging Face tensors and read one at a time.

    checkpoint.py, meta.py, gguf.py  ->  Weights  ->  a Transformer, or convert.py

Every format is checked here in the same way before a byte of a tensor is read: all names, all
shapes, no surplus. Nothing here knows a file format, except how a small JSON file is read safely.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codellama.model.config import ModelConfig
from codellama.model.quantize import Int4Linear, Int8Linear, Shaped, parts_of, quantized
from codellama.model.transformer import Transformer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUANTIZED = ("int8", "int4")
LOAD_DTYPES = (*DTYPES, *QUANTIZED)
MAX_JSON_BYTES = 32 << 20  # the index of the 70B checkpoint has 60 kB, a tokenizer.json 2 MB


@dataclass(frozen=True)
class Stored:
    """One tensor as the Hugging Face layout sees it, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # the type that `read` returns when none is asked for
    precision: str  # how it is stored: "bfloat16", "Q4_K" ...
    n_bytes: int
    where: str  # the file, for messages


@dataclass(frozen=True)
class Weights:
    """The weights of one model in files.

    `read(name, dtype)` returns one tensor in Hugging Face's layout; `dtype` None keeps the stored
    type. The result may be mapped to the file.
    """

    kind: str  # "hf", "meta" or "gguf"
    path: Path
    config: ModelConfig
    tensors: dict[str, Stored]
    read: Callable[[str, torch.dtype | None], Tensor]
    extra: dict[str, Any]  # metadata that other parts understand, such as GGUF's
    layer: Callable[[str], Int8Linear | Int4Linear] | None = None
    """The layer of a matrix whose precision is one of `QUANTIZED`."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrices: what a conversion writes when none is asked for."""
        return self.tensors["model.layers.0.self_attn.q_proj.weight"].dtype


def build_model(
    weights: Weights,
    device: str = "cpu",
    dtype: str | None = "bfloat16",
    allow_nonfinite: bool = False,
) -> Transformer:
    """Read all weights into a model that is ready to run.

    Args:
        dtype: "bfloat16", "float16", "float32"; "int8" keeps the matrices as 8-bit integers with
            one scale for each output, "int4" as 4-bit integers with one for each 32 inputs, and
            either takes integers that the files hold as they are; None keeps what the files hold.
        allow_nonfinite: accept NaN and infinite weights.

    Raises:
        ValueError: a tensor is missing, extra, misshaped or damaged; the message names it.
    """
    if dtype is not None and dtype not in LOAD_DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(LOAD_DTYPES)}")
    check_tensors(weights)
    with torch.device("meta"):
        model = Transformer(weights.config)
    target = None if dtype is None else DTYPES.get(dtype, torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    for name, stored in weights.tensors.items():
        module = name.rpartition(".")[0]
        is_matrix = len(stored.shape) == 2 and module != "model.embed_tokens"
        if is_matrix and dtype in QUANTIZED and stored.precision in QUANTIZED and weights.layer:
            linear = weights.layer(name).to(device)
        else:
            tensor = read_checked(weights, name, target, allow_nonfinite).to(device)
            if not is_matrix or dtype not in QUANTIZED:
                # A copy beside integers, so that no mapping of a whole file lives on for the sake
                # of one small tensor.
                tensors[name] = tensor.clone() if dtype in QUANTIZED else tensor
                continue
            linear = quantized(tensor, dtype, is_head=module == "lm_head")
        model.set_submodule(module, linear)
        tensors |= {f"{module}.{key}": value for key, value in linear.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def check_tensors(weights: Weights) -> None:
    """Compare the names and shapes of all tensors with what the config asks for.

    Raises:
        ValueError: they differ; names the first tensor that does.
    """
    n_layers = weights.config.num_hidden_layers
    # Before anything is built: a damaged config may ask for billions of layers.
    if n_layers > len(weights.tensors):
        raise ValueError(
            f"{weights.path}: the configuration asks for {n_layers} layers, but there are only "
            f"{len(weights.tensors)} tensors"
        )
    wanted = tensor_shapes(weights.config)
    for name, stored in weights.tensors.items():
        if name in wanted and stored.shape != wanted[name]:
            raise ValueError(
                f"{stored.where}: tensor {name!r} has shape {stored.shape}, "
                f"but the configuration asks for {wanted[name]}"
            )
    check_names(str(weights.path), wanted, set(weights.tensors))


def check_names(where: str, wanted: dict[str, Any], found: set[str]) -> None:
    """Refuse missing and extra tensors.

    Raises:
        ValueError: names the first of them.
    """
    for problem, names in (
        ("missing", [name for name in wanted if name not in found]),
        ("not part of this model", sorted(found.difference(wanted))),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{where}: tensor {names[0]!r}{more} {problem}")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model by its Hugging Face name, with its shape."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stored_shapes(config: ModelConfig, dtype: str) -> dict[str, Shaped]:
    """As `tensor_shapes`, with types, for a model in one of `LOAD_DTYPES`."""
    found: dict[str, Shaped] = {}
    for name, shape in tensor_shapes(config).items():
        module = name.removesuffix(".weight")
        if dtype in DTYPES or len(shape) == 1 or module == "model.embed_tokens":
            found[name] = shape, DTYPES.get(dtype, torch.bfloat16)
        else:
            parts = parts_of(shape, dtype, module == "lm_head")
            found |= {f"{module}.{key}": part for key, part in parts.items()}
    return found


def read_checked(
    weights: Weights, name: str, dtype: torch.dtype | None, allow_nonfinite: bool = False
) -> Tensor:
    """Read one tensor, whose values must be finite numbers in the type asked for.

    Raises:
        ValueError: the tensor is damaged, or has values that are not finite.
    """
    tensor = weights.read(name, dtype)
    # One pass at the speed of memory; NaN and infinity survive a sum. A sum that overflows although
    # all values are finite costs a second, exact look.
    if allow_nonfinite or math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all()):
        return tensor
    where = weights.tensors[name].where
    if bool(weights.read(name, torch.float32).isfinite().all()):
        raise ValueError(f"{where}: tensor {name!r} has values too large for {short(tensor.dtype)}")
    raise ValueError(f"{where}: tensor {name!r} has values that are NaN or infinite")


def short(dtype: torch.dtype) -> str:
    """The name of a type without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is too large, damaged, or holds something else; names it.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return values
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None


def inside(folder: Path, filename: str) -> Path:
    """The path of a file of a checkpoint that may not lie outside of its folder.

    The links of a Hugging Face cache, from `snapshots/REVISION` to `blobs`, are the exception.

    Raises:
        ValueError: the name or a link leads out.
    """
    path = folder / filename
    if Path(filename).name != filename:
        raise ValueError(f"{folder}: file name {filename!r} is not a plain name")
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise ValueError(f"{path}: a link that leads out of its folder, to {target}")
    return path
