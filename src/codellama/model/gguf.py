"""GGUF files: a strict reader, and a writer that streams.

    header, key-value metadata, directory of tensors, padding, tensor data

Every count and size is compared with the file before anything is allocated, in Python's unbounded
integers, so that a damaged file can ask for nothing. The vocabulary in the metadata is not
understood here; it is handed on in `Weights.extra`. Block formats are in gguf_blocks.py.

Llama files keep query and key rows in the order of Meta's layout.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codellama.model.config import ModelConfig
from codellama.model.gguf_blocks import BY_NAME, FORMATS, PLAIN, BlockFormat, dequantize
from codellama.model.meta import foreign_name, is_rotated, to_halves
from codellama.model.source import Stored, Weights

MAGIC = b"GGUF"
ALIGNMENT = 32  # the format's default, and what we write
_MAX_ALIGNMENT = 1 << 20
_MAX_HEADER_BYTES = 256 << 20  # metadata and directory; 1 MB for Code Llama's vocabulary
_MAX_ENTRIES = 65_536  # keys, or tensors; the 70B model has 723 tensors
_MAX_STRINGS = 1 << 20  # in one array: pieces of a vocabulary, or merges
_MAX_DIMENSIONS = 4

_U8, _I8, _U16, _I16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64, _F64 = range(13)
_NUMBERS = {
    **{_U8: "<u1", _I8: "<i1", _U16: "<u2", _I16: "<i2", _U32: "<u4", _I32: "<i4"},
    **{_F32: "<f4", _BOOL: "<u1", _U64: "<u8", _I64: "<i8", _F64: "<f8"},
}

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


@dataclass(frozen=True)
class Directory:
    """What stands in front of the tensor data."""

    metadata: dict[str, Any]  # arrays of numbers as numpy arrays, arrays of strings as lists
    tensors: dict[str, tuple[BlockFormat, tuple[int, ...], int, int]]
    # name -> (format, shape as torch has it, offset in the file, bytes)


class _Cursor:
    """Reads the header of a mapped file; every step is checked against its end."""

    def __init__(self, data: mmap.mmap, end: int) -> None:
        self.data, self.at, self.end = data, 0, end

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.end - self.at:
            raise ValueError(f"cut short: {n_bytes} bytes wanted at byte {self.at} of the header")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def number(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8")

    def count(self, what: str) -> int:
        value = self.number("<Q")
        if value > _MAX_ENTRIES:
            raise ValueError(f"{value} {what}; at most {_MAX_ENTRIES} are accepted")
        return value

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.numbers(kind, 1)[0].item()

    def array(self) -> Any:
        kind, length = self.number("<I"), self.number("<Q")
        if kind != _STRING:
            return self.numbers(kind, length)
        if length > _MAX_STRINGS:
            raise ValueError(f"an array of {length} strings; at most {_MAX_STRINGS} are accepted")
        return [self.string() for _ in range(length)]

    def numbers(self, kind: int, length: int) -> Any:
        if kind not in _NUMBERS:
            raise ValueError(f"unknown or unsupported value type {kind} at byte {self.at}")
        dtype = np.dtype(_NUMBERS[kind])
        values = np.frombuffer(self.take(length * dtype.itemsize), dtype)
        return values.astype(bool) if kind == _BOOL else values


def read_directory(path: Path) -> Directory:
    """Read the metadata and the directory of a GGUF file.

    Raises:
        ValueError: not a GGUF file, damaged, or with sizes that its length contradicts.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, min(len(data), _MAX_HEADER_BYTES)), len(data))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: damaged GGUF file: a string is not valid UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged or unsupported GGUF file: {error}") from None


def _parse(cursor: _Cursor, n_bytes: int) -> Directory:
    magic = cursor.take(4)
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic!r}, not {MAGIC!r}")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}; little-endian versions 2 and 3 are accepted")
    n_tensors = cursor.count("tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("metadata keys")):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"metadata key {key[:80]!r} occurs twice")
        metadata[key] = cursor.value()
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT:
        raise ValueError(f"general.alignment = {alignment!r}: expected 8 to {_MAX_ALIGNMENT}")
    if alignment & (alignment - 1):
        raise ValueError(f"general.alignment = {alignment}: expected a power of two")
    entries = [_parse_tensor(cursor, alignment) for _ in range(n_tensors)]
    start = cursor.at + -cursor.at % alignment
    tensors: dict[str, tuple[BlockFormat, tuple[int, ...], int, int]] = {}
    end = start
    for name, form, shape, offset, size in sorted(entries, key=lambda entry: entry[3]):
        if name in tensors:
            raise ValueError(f"tensor {name!r} occurs twice")
        if start + offset < end:
            raise ValueError(f"tensor {name!r} overlaps another one")
        end = start + offset + size
        if end > n_bytes:
            raise ValueError(f"tensor {name!r} ends at byte {end}, the file at {n_bytes}")
        tensors[name] = (form, shape, start + offset, size)
    return Directory(metadata, tensors)


def _parse_tensor(
    cursor: _Cursor, alignment: int
) -> tuple[str, BlockFormat, tuple[int, ...], int, int]:
    name = cursor.string()[:200]
    n_dimensions = cursor.number("<I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {n_dimensions} dimensions, not 1 to 4")
    sizes = [cursor.number("<Q") for _ in range(n_dimensions)]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    form = FORMATS.get(number)
    if form is None:
        raise ValueError(f"tensor {name!r} has type {number}; accepted: {', '.join(BY_NAME)}")
    if 0 in sizes or sizes[0] % form.n_values:
        raise ValueError(f"tensor {name!r} of {form.name} has the impossible shape {sizes}")
    if offset % alignment:
        raise ValueError(f"tensor {name!r} begins at {offset}, no multiple of {alignment}")
    n_bytes = math.prod(sizes) // form.n_values * form.n_bytes
    return name, form, tuple(reversed(sizes)), offset, n_bytes


# -- a Llama model ------------------------------------------------------------------------------


def open_gguf(path: Path) -> Weights:
    """Open a GGUF file of a Llama model.

    Raises:
        ValueError: damaged, another kind of model, or a feature that Code Llama does not have.
    """
    directory = read_directory(path)
    try:
        config = parse_config(directory)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors: dict[str, Stored] = {}
    places: dict[str, tuple[BlockFormat, tuple[int, ...], int, int]] = {}
    for name, place in directory.tensors.items():
        hf_name = to_hf_name(name)
        if hf_name is None:
            raise ValueError(f"{path}: tensor {name!r} not part of this model")
        form, shape, _, n_bytes = place
        dtype = PLAIN.get(form.name, torch.bfloat16)
        tensors[hf_name] = Stored(shape, dtype, form.name, n_bytes, str(path))
        places[hf_name] = place

    def read(name: str, dtype: torch.dtype | None) -> Tensor:
        form, shape, offset, n_bytes = places[name]
        # A mapping of its own for each tensor, which ends with it; changes would stay in memory.
        data = torch.from_numpy(np.memmap(path, np.uint8, "c", offset, (n_bytes,)))
        tensor = dequantize(data, form, dtype or tensors[name].dtype).view(shape)
        return to_halves(tensor, config.head_dim) if is_rotated(name) else tensor

    return Weights("gguf", path, config, tensors, read, directory.metadata)


def to_hf_name(name: str) -> str | None:
    """Hugging Face's name of a tensor of a Llama GGUF file; None where there is none."""
    parts = name.split(".")
    if parts[-1] == "weight" and len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.weight"
    if parts[-1] != "weight" or len(parts) != 4 or parts[0] != "blk":
        return None
    if not (parts[1].isdecimal() and parts[1].isascii()) or parts[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"


def to_gguf_name(name: str) -> str:
    """The name of a Hugging Face tensor in a GGUF file."""
    return foreign_name(name, _TOP_NAMES, "blk", _LAYER_NAMES)


def parse_config(directory: Directory) -> ModelConfig:
    """Read a model's shape from the metadata, the vocabulary's size from the embedding.

    Raises:
        ValueError: another architecture, a missing key, or a feature that Code Llama has not.
    """
    metadata = directory.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture = {architecture!r}: only 'llama' is accepted")

    def number(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise ValueError(f"metadata key 'llama.{key}' is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"llama.{key}: expected a number")
        return value

    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError("llama.rope.scaling.type is set; Code Llama has no scaled rotation")
    if number("expert_count", 0):
        raise ValueError("a mixture of experts, which Code Llama is not")
    embedding = directory.tensors.get("token_embd.weight")
    if embedding is None or len(embedding[1]) != 2:
        raise ValueError("tensor 'token_embd.weight' is missing or no matrix")
    n_heads = number("attention.head_count")
    config = ModelConfig(
        hidden_size=number("embedding_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=number("attention.head_count_kv", n_heads),
        intermediate_size=number("feed_forward_length"),
        vocab_size=embedding[1][0],
        rope_theta=_as_written(number("rope.freq_base", 1e4)),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=_as_written(number("attention.layer_norm_rms_epsilon")),
    )
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if number(key, config.head_dim) != config.head_dim:
            raise ValueError(f"llama.{key} = {number(key)}, but a head has {config.head_dim}")
    return config


def _as_written(value: float) -> float:
    """The shortest decimal number that is the same in float32: 1e-5, not 9.999999747e-06."""
    return float(str(np.float32(value)))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model's shape."""
    return {
        "general.architecture": "llama",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.vocab_size": config.vocab_size,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[BlockFormat, tuple[int, ...]]],
    contents: Iterable[memoryview],
) -> None:
    """Write a GGUF file, holding the bytes of one tensor at a time.

    Args:
        metadata: str, bool, int (as uint32), float (as float32), lists of str, numpy arrays.
        contents: the bytes of each of `tensors`, in their order.

    Raises:
        OSError: the file cannot be written.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _pack_string(key) + _pack_value(value)
    offset = 0
    for name, (form, shape) in tensors.items():
        head += _pack_string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", form.number, offset)
        offset += tensor_bytes(form, shape)
        offset += -offset % ALIGNMENT
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for (form, shape), data in zip(tensors.values(), contents, strict=True):
            assert data.nbytes == tensor_bytes(form, shape)
            file.write(data)
            file.write(bytes(-data.nbytes % ALIGNMENT))


def tensor_bytes(form: BlockFormat, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor in a format."""
    return math.prod(shape) // form.n_values * form.n_bytes


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pack_value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _pack_string(value)
    if isinstance(value, list):
        strings = b"".join(map(_pack_string, value))
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + strings
    kind = {np.dtype("f4"): _F32, np.dtype("i4"): _I32}[value.dtype]
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.tobytes()
