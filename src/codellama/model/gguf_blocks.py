"""The block formats of GGUF tensors: bytes to numbers, and back for those that we write.

A quantised row is cut into blocks of 32 or 256 values; each block holds small integers and the
scale (and for some formats the offset) that turns them into numbers. All arithmetic is float32 in
the order of ggml's own, so that values agree bit for bit.

    [n_blocks, block bytes] uint8  ->  [n_blocks, block values] float32

Source: the block structures of ggml's ggml-common.h; values checked against the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """One tensor type: its number in files, its block, and how its bytes become numbers."""

    name: str
    number: int
    n_values: int
    n_bytes: int
    dequantize: Callable[[Tensor], Tensor]


def _f16(blocks: Tensor, at: int) -> Tensor:
    """A float16 field of every block, as a column of float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """Low halves of all bytes, then high halves."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _fifth_bits(data: Tensor) -> Tensor:
    """32 bits in 4 bytes, as the values 0 and 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((data[..., None] >> shifts) & 1) << 4).flatten(1)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float() * _f16(b, 0)


def _q4_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 2:]).float() - 8) * _f16(b, 0)


def _q4_1(b: Tensor) -> Tensor:
    return _nibbles(b[:, 4:]).float() * _f16(b, 0) + _f16(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).float() - 16) * _f16(b, 0)


def _q5_1(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).float() * _f16(b, 0) + _f16(b, 2)


def _scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and eight 6-bit offsets packed in bytes 4 to 15, times d and dmin."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return _f16(b, 0) * scales.float(), _f16(b, 2) * minima.float()


def _q4_k(b: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(b)
    values = _nibbles(b[:, 16:].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    return (values.float() * scales[..., None] - minima[..., None]).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(b)
    values = _nibbles(b[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    values = values | (((b[:, None, 16:48] >> shifts) & 1) << 4)
    return (values.float() * scales[..., None] - minima[..., None]).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 64)
    low = _nibbles(low).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    values = (low | (high << 4)).float() - 32
    scales = b[:, 192:208].contiguous().view(torch.int8).float() * _f16(b, 208)
    return (values.reshape(-1, 16, 16) * scales[..., None]).flatten(1)


def _bf16(b: Tensor) -> Tensor:
    return b.view(torch.bfloat16).float()


FORMATS = {
    form.number: form
    for form in (
        BlockFormat("F32", 0, 1, 4, lambda b: b.view(torch.float32)),
        BlockFormat("F16", 1, 1, 2, lambda b: b.view(torch.float16).float()),
        BlockFormat("Q4_0", 2, 32, 18, _q4_0),
        BlockFormat("Q4_1", 3, 32, 20, _q4_1),
        BlockFormat("Q5_0", 6, 32, 22, _q5_0),
        BlockFormat("Q5_1", 7, 32, 24, _q5_1),
        BlockFormat("Q8_0", 8, 32, 34, _q8_0),
        BlockFormat("Q4_K", 12, 256, 144, _q4_k),
        BlockFormat("Q5_K", 13, 256, 176, _q5_k),
        BlockFormat("Q6_K", 14, 256, 210, _q6_k),
        BlockFormat("BF16", 30, 1, 2, _bf16),
    )
}
BY_NAME = {form.name: form for form in FORMATS.values()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_VALUES = 1 << 17  # parts stay in the cache: up to four times as fast as 16 MB ones


def dequantize(data: Tensor, form: BlockFormat, dtype: torch.dtype) -> Tensor:
    """All values of a tensor's bytes [n_bytes] uint8, flat."""
    if PLAIN.get(form.name) is dtype:
        return data.view(dtype)
    blocks = data.view(-1, form.n_bytes)
    out = torch.empty(blocks.shape[0] * form.n_values, dtype=dtype)
    step = _CHUNK_VALUES // form.n_values
    for start in range(0, blocks.shape[0], step):
        part = form.dequantize(blocks[start : start + step]).flatten()
        out[start * form.n_values : start * form.n_values + part.numel()] = part
    return out


def quantize(values: Tensor, form: BlockFormat) -> Tensor:
    """The bytes [n_bytes] uint8 of a tensor in Q8_0 or Q4_0."""
    flat = values.flatten()
    step = _CHUNK_VALUES // form.n_values * form.n_values
    encode = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0}[form.name]
    parts = [
        encode(flat[start : start + step].float().view(-1, form.n_values))
        for start in range(0, flat.numel(), step)
    ]
    return torch.cat([part.flatten() for part in parts])


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _to_q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    # Halves are rounded away from zero.
    size = scaled.abs()
    whole = size.floor()
    rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())
    integers = rounded.to(torch.int8).view(torch.uint8)
    return torch.cat((scale.half().view(torch.uint8), integers), dim=1)


def _to_q4_0(x: Tensor) -> Tensor:
    # The value of the largest size, with its sign, becomes -8, the end of the range 0..15 minus 8.
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    scale = largest / -8
    integers = (x * _inverse(scale) + 8.5).to(torch.uint8).clamp_(max=15)
    packed = integers[:, :16] | (integers[:, 16:] << 4)
    return torch.cat((scale.half().view(torch.uint8), packed), dim=1)
