"""From any weights to a Hugging Face folder, a Meta folder or a GGUF file, tensor by tensor.

No more than one tensor and its copies are in memory at a time; what is written appears under its
name only when it is whole. Tokenizer files are written by the caller, through a function.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codellama.artifact import new_folder, write_manifest
from codellama.model.checkpoint import SAFETENSORS_DTYPES, plan_shards, write_json_files
from codellama.model.gguf import to_gguf_name, write_config, write_gguf
from codellama.model.gguf_blocks import BY_NAME, PLAIN, BlockFormat, quantize
from codellama.model.meta import (
    PARAMS_FILE,
    is_rotated,
    params_text,
    shard_parts,
    shard_shapes,
    to_meta_name,
    to_neighbours,
)
from codellama.model.quantize import Shaped
from codellama.model.quantize import quantized as quantize_layer
from codellama.model.source import (
    DTYPES,
    Weights,
    check_tensors,
    read_checked,
    short,
    stored_shapes,
    tensor_shapes,
)
from codellama.model.torch_files import as_bytes, torch_file

QUANTIZED = {"q8_0": "Q8_0", "q4_0": "Q4_0"}
# llama.cpp's number for the mixture of types in a file (general.file_type).
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Reader:
    """Reads the tensors of a conversion in their order, checks them and reports progress."""

    def __init__(
        self,
        weights: Weights,
        dtype: str | None = None,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        check_tensors(weights)
        self.weights, self.config = weights, weights.config
        self.dtype = weights.dtype if dtype is None else DTYPES[dtype]
        self.names = list(tensor_shapes(weights.config))
        self._allow_nonfinite, self._progress = allow_nonfinite, progress
        self._done, self._total = 0, sum(stored.n_bytes for stored in weights.tensors.values())

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read one tensor, which counts as progress."""
        tensor = read_checked(self.weights, name, dtype, self._allow_nonfinite)
        self._done += self.weights.tensors[name].n_bytes
        if self._progress:
            self._progress(min(self._done, self._total), self._total)
        return tensor


def write_hf(
    reader: Reader,
    folder: Path,
    write_more: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    eos_ids: int | list[int] = 2,
    quantized: str | None = None,
) -> None:
    """Write a Hugging Face folder.

    Args:
        quantized: "int8" or "int4" for the matrices, which only this package reads.

    Raises:
        OSError: it cannot be written; what stood there before is untouched.
    """
    dtype = reader.dtype if quantized is None else torch.bfloat16
    plan = stored_shapes(reader.config, quantized or short(dtype))
    layers: dict[str, Tensor] = {}  # parts of one matrix

    def contents(name: str) -> Tensor:
        module = name.rpartition(".")[0]
        if (
            quantized is None
            or f"{module}.weight" not in plan
            or plan[f"{module}.weight"][1] == dtype
        ):
            return reader.read(name, dtype)
        if name not in layers:
            matrix = reader.read(f"{module}.weight", dtype)
            state = quantize_layer(matrix, quantized, module == "lm_head").state_dict()
            layers.clear()
            layers.update({f"{module}.{key}": part for key, part in state.items()})
        return layers[name]

    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in plan.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    with _room(folder, sum(sizes.values())), new_folder(folder) as temporary:
        for filename, names in shards.items():
            names.sort()  # the order of the safetensors library: the same files, byte for byte
            with (temporary / filename).open("wb") as file:
                file.write(_safetensors_header({name: plan[name] for name in names}))
                for name in names:
                    file.write(as_bytes(contents(name)))
        total = sum(sizes.values())
        more = {"quantization_config": {"quant_method": f"codellama-{quantized}"}}
        more = more if quantized else {}
        write_json_files(temporary, reader.config, short(dtype), shards, total, eos_ids, **more)
        if write_more:
            write_more(temporary)


def _safetensors_header(plan: dict[str, Shaped]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in plan.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_meta(
    reader: Reader,
    folder: Path,
    n_shards: int = 1,
    write_more: Callable[[Path], None] | None = None,
    **manifest: Any,
) -> None:
    """Write a Meta folder of `n_shards` shards.

    Args:
        manifest: what params.json has no field for, kept in our own manifest.json.

    Raises:
        ValueError: the model cannot be cut into so many shards.
        OSError: it cannot be written; what stood there before is untouched.
    """
    config, dtype = reader.config, reader.dtype
    shapes = shard_shapes(config, n_shards)
    total = n_shards * sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize

    with _room(folder, total), new_folder(folder) as temporary:
        with ExitStack() as files:
            write = [
                files.enter_context(
                    torch_file(temporary / f"consolidated.{shard:02d}.pth", shapes, dtype)
                )
                for shard in range(n_shards)
            ]
            for name in reader.names:
                tensor = reader.read(name, dtype)
                for shard, part in enumerate(shard_parts(tensor, name, n_shards, config.head_dim)):
                    write[shard](to_meta_name(name), part)
        (temporary / PARAMS_FILE).write_text(params_text(config), encoding="utf-8")
        context = {"max_position_embeddings": config.max_position_embeddings}
        write_manifest(temporary, "meta checkpoint", **context, **manifest)
        if write_more:
            write_more(temporary)


def write_gguf_file(
    reader: Reader, path: Path, vocabulary: dict[str, Any], quantized: str | None = None
) -> None:
    """Write a GGUF file.

    Args:
        vocabulary: the tokenizer's metadata.
        quantized: "q8_0" or "q4_0" for the matrices; one-dimensional tensors are float32 always.

    Raises:
        ValueError: an unknown format, or rows that do not divide into its blocks.
        OSError: the file cannot be written; what stood there before is untouched.
    """
    if quantized is not None and quantized not in QUANTIZED:
        raise ValueError(f"quantize {quantized!r}: expected one of {', '.join(QUANTIZED)}")
    plain = next(name for name, dtype in PLAIN.items() if dtype is reader.dtype)
    main = BY_NAME[QUANTIZED[quantized] if quantized else plain]
    plan: dict[str, tuple[BlockFormat, tuple[int, ...]]] = {}
    for name, shape in tensor_shapes(reader.config).items():
        form = _format_of(name, shape, main)
        if shape[-1] % form.n_values:
            raise ValueError(
                f"tensor {name!r} has rows of {shape[-1]} values, which {form.name} cannot cut "
                f"into blocks of {form.n_values}"
            )
        plan[name] = (form, shape)
    metadata = write_config(reader.config) | {
        "general.file_type": _FILE_TYPES[main.name],
        "general.quantization_version": 2,
        **vocabulary,
    }

    def contents() -> Iterator[memoryview]:
        for name, (form, _) in plan.items():
            dtype = PLAIN.get(form.name, torch.float32)
            # Quantised from the type asked for, or the stored one: no rounding comes between.
            tensor = reader.read(name, dtype)
            if is_rotated(name):
                tensor = to_neighbours(tensor, reader.config.head_dim)
            yield as_bytes(tensor if form.name in PLAIN else quantize(tensor, form))

    total = sum(math.prod(s) // form.n_values * form.n_bytes for form, s in plan.values())
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    directory = {to_gguf_name(name): entry for name, entry in plan.items()}
    with _room(path, total):
        try:
            write_gguf(temporary, metadata, directory, contents())
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _format_of(name: str, shape: tuple[int, ...], main: BlockFormat) -> BlockFormat:
    """How a tensor is stored in a file of mostly `main`."""
    if len(shape) == 1:
        return BY_NAME["F32"]
    # The last projection decides between near-equal tokens: 4 bits are too few for it.
    return BY_NAME["Q8_0"] if main.name == "Q4_0" and name == "lm_head.weight" else main


@contextmanager
def _room(path: Path, n_bytes: int) -> Iterator[None]:
    """Turn a full disk into one clear line, if possible before anything is written.

    Raises:
        OSError: there is not enough room.
    """
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    hint = f"{n_bytes / 1e9:.2f} GB are needed and nothing was left at {path}"
    if free < n_bytes:
        raise OSError(ENOSPC, f"the disk has only {free / 1e9:.2f} GB free; {hint}")
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"writing failed: {error.strerror or error}; {hint}") from None
