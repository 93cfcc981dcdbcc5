"""Quantisation: linear layers that hold their matrix as integers.

int8 has one scale for each output and half the memory of bfloat16; int4 has a scale and a lowest
value for each group of inputs and a little more than a quarter. Outputs and everything else stay in
the floating-point type; so do inputs, except within a `multiply` that is given from outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Multiply = Callable[[Tensor], Tensor | None]
"""[N, inputs] -> [N, outputs], or None where it cannot."""

_FEW_ROWS = 8  # up to here the packed kernel of the CPU is the faster one, measured at 4096 x 11008

INT4_GROUPS = (32, 64, 128)
_CHUNK = 64  # inputs of int4 whose integers lie together; the last chunk is filled with zeros


class Int8Linear(nn.Module):
    """y = x W^T with W = scale * integers in -127..127; a drop-in for a bias-free `nn.Linear`."""

    weight: Tensor  # [outputs, inputs] int8
    scale: Tensor  # [outputs] in the type of the inputs
    multiply: Multiply | None = None
    """A faster product, where there is one."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def quantized(cls, weight: Tensor) -> Int8Linear:
        """Round a matrix [outputs, inputs] so that the largest value of each row becomes 127."""
        integers = torch.empty_like(weight, dtype=torch.int8)
        scales = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
        rows = max(1, (1 << 17) // weight.shape[1])  # parts stay in the cache: four times as fast
        for start in range(0, weight.shape[0], rows):
            part = weight[start : start + rows].float()
            # The scale is rounded first: the integers then fit the scale that is really used.
            scale = (part.abs().amax(dim=1) / 127).clamp(min=1e-30).to(weight.dtype)
            scales[start : start + rows] = scale
            quotients = (part / scale.float()[:, None]).round_().clamp_(-127, 127)
            integers[start : start + rows] = quotients.to(torch.int8)
        return cls(integers, scales)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix [outputs, inputs]."""
        return (self.weight * self.scale.float()[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        many = None if self.multiply is None else self.multiply(rows)
        # The packed kernel reads past the ends of rows that are not a multiple of 16 wide.
        is_packable = rows.device.type == "cpu" and self.in_features % 16 == 0
        if many is not None:
            out = many
        elif is_packable and 0 < rows.shape[0] <= _FEW_ROWS:
            out = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            out = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return out.view(*x.shape[:-1], out.shape[-1])


class Int4Linear(nn.Module):
    """y = x W^T with W = low + scale * integers, integers 0..15, for each group of inputs.

    The integers of 64 inputs lie in 32 bytes, so that one shift and a mask give them to the byte
    products of the processor: inputs i and 32 + i take turns, four of each, and the second half of
    these 64 are the high halves of the bytes.
    """

    weight: Tensor  # [outputs, inputs / 2] uint8; inputs are filled up to a multiple of 64
    scales: Tensor  # [outputs, 2, inputs / group] bfloat16: the scales, and the lowest values
    multiply: Multiply | None = None
    """A faster product, where there is one."""

    def __init__(self, weight: Tensor, scales: Tensor, in_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.in_features, self.out_features = in_features, weight.shape[0]
        self.group = 2 * weight.shape[1] // scales.shape[2]

    @classmethod
    def quantized(cls, weight: Tensor, group: int = 32) -> Int4Linear:
        """Round a matrix [outputs, inputs], each group to 16 levels between its extremes.

        Raises:
            ValueError: the group is not 32, 64 or 128, or does not divide the inputs.
        """
        n_out, n_in = weight.shape
        if group not in INT4_GROUPS:
            raise ValueError(f"group = {group}: expected one of {', '.join(map(str, INT4_GROUPS))}")
        if n_in % group:
            raise ValueError(f"{n_in} inputs do not divide into groups of {group}")
        n_padded = -(-n_in // _CHUNK) * _CHUNK
        device = weight.device
        packed = torch.empty(n_out, n_padded // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(n_out, 2, n_padded // group, dtype=torch.bfloat16, device=device)
        rows = max(1, (1 << 17) // n_in)  # parts stay in the cache
        for start in range(0, n_out, rows):
            part = F.pad(weight[start : start + rows].float(), (0, n_padded - n_in))
            integers, scale, low = _round_groups(part.unflatten(1, (-1, group)))
            places = slice(start, start + len(part))
            turns = integers.view(-1, n_padded // _CHUNK, 2, 8, 4).transpose(2, 3)
            first, second = turns.reshape(-1, n_padded // _CHUNK, 2, 32).unbind(2)
            packed[places] = (first | second << 4).flatten(1)
            scales[places, 0], scales[places, 1] = scale[..., 0], low[..., 0]
        return cls(packed, scales, n_in)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix [outputs, inputs]."""
        chunks = self.weight.unflatten(1, (-1, 32))
        turns = torch.cat((chunks & 15, chunks >> 4), -1).unflatten(2, (8, 2, 4)).transpose(2, 3)
        groups = turns.reshape(len(turns), -1, self.group)
        scale, low = self.scales.float()[..., None].unbind(1)
        return (groups * scale + low).flatten(1)[:, : self.in_features].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        out = None if self.multiply is None else self.multiply(rows)
        if out is None:
            out = F.linear(rows, self.dequantized(x.dtype))
        return out.view(*x.shape[:-1], self.out_features)


def _round_groups(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [n, groups, group] uint8, and scales and lowest values [n, groups, 1] bfloat16.

    Of a few ranges a little narrower than the values, the one with the least squared error is
    taken: clipping an extreme often costs less than coarser steps for all the others.
    """
    lowest, highest = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
    least = best = None
    for share in (1.0, 0.94, 0.88, 0.82):
        # Both are rounded first: the integers then fit what is really used.
        scale = ((highest - lowest) * share / 15).clamp(min=1e-20).bfloat16()
        low = ((highest + lowest) / 2 - 7.5 * scale.float()).bfloat16()
        integers = ((part - low.float()) / scale.float()).round_().clamp_(0, 15)
        error = (integers * scale.float() + low.float() - part).square().sum(-1, keepdim=True)
        if least is None or best is None:
            least, best = error, (integers, scale, low)
            continue
        is_better = error < least
        least = torch.where(is_better, error, least)
        pairs = zip((integers, scale, low), best, strict=True)
        best = tuple(torch.where(is_better, new, old) for new, old in pairs)
    assert best is not None
    return best[0].to(torch.uint8), best[1], best[2]


def is_int4(n_in: int, dtype: str, is_head: bool = False) -> bool:
    """Whether "int8" or "int4" means 4 bits for a matrix.

    In int4, the projection to the vocabulary is kept in int8, and so is a matrix that does not
    divide into groups.
    """
    return dtype == "int4" and not is_head and n_in % INT4_GROUPS[0] == 0


def quantized(weight: Tensor, dtype: str, is_head: bool = False) -> Int8Linear | Int4Linear:
    """The layer for a matrix in "int8" or "int4"."""
    if is_int4(weight.shape[1], dtype, is_head):
        return Int4Linear.quantized(weight)
    return Int8Linear.quantized(weight)


Shaped = tuple[tuple[int, ...], torch.dtype]


def parts_of(shape: tuple[int, ...], dtype: str, is_head: bool) -> dict[str, Shaped]:
    """Names, shapes and types of the tensors of a layer, in the order of a file."""
    n_out, n_in = shape
    if not is_int4(n_in, dtype, is_head):
        return {"scale": ((n_out,), torch.bfloat16), "weight": (shape, torch.int8)}
    n_padded = -(-n_in // _CHUNK) * _CHUNK
    scales = (n_out, 2, n_padded // INT4_GROUPS[0]), torch.bfloat16
    return {"scales": scales, "weight": ((n_out, n_padded // 2), torch.uint8)}


SCALES = {torch.int8: "scale", torch.uint8: "scales"}
"""The tensor that belongs to a matrix of integers in a file."""


def restored(weight: Tensor, scales: Tensor, n_in: int) -> Int8Linear | Int4Linear:
    """The layer of two tensors of a file.

    Raises:
        ValueError: they do not belong together, or a scale is not a finite number.
    """
    n_out, n_stored = weight.shape
    n_padded = -(-n_in // _CHUNK) * _CHUNK
    n_groups = [n_padded // group for group in INT4_GROUPS if n_in % group == 0]
    wanted = [(n_out,)] if weight.dtype == torch.int8 else [(n_out, 2, n) for n in n_groups]
    if n_stored != (n_in if weight.dtype == torch.int8 else n_padded // 2):
        raise ValueError(f"{n_stored} bytes a row do not hold {n_in} inputs")
    if tuple(scales.shape) not in wanted or scales.dtype != torch.bfloat16:
        raise ValueError(f"scales {tuple(scales.shape)} {scales.dtype}: expected bfloat16 {wanted}")
    if not scales.isfinite().all():
        raise ValueError("scales that are NaN or infinite")
    if weight.dtype == torch.int8:
        return Int8Linear(weight, scales)
    return Int4Linear(weight, scales, n_in)
