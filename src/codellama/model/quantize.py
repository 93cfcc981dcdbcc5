"""Weight-only quantisation: linear layers that hold their matrix as integers.

int8 has one scale for each output and half the memory of bfloat16; int4 has a scale and a zero for
each group of inputs and a little more than a quarter. Inputs, outputs and everything else stay in
the floating-point type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW_ROWS = 8  # up to here the packed kernel of the CPU is the faster one, measured at 4096 x 11008

INT4_GROUPS = (32, 64, 128)


class Int8Linear(nn.Module):
    """y = x W^T with W = scale * integers in -127..127; a drop-in for a bias-free `nn.Linear`."""

    weight: Tensor  # [outputs, inputs] int8
    scale: Tensor  # [outputs] in the type of the inputs

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

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        # The packed kernel reads past the ends of rows that are not a multiple of 16 wide.
        is_packable = rows.device.type == "cpu" and self.in_features % 16 == 0
        if is_packable and 0 < rows.shape[0] <= _FEW_ROWS:
            out = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            out = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return out.view(*x.shape[:-1], out.shape[-1])


class Int4Linear(nn.Module):
    """y = x W^T with W = scale * (integers - 8) + zero, integers 0..15, for each group of inputs.

    CPU only. The integers lie in the order that this processor's kernel wants: a state of this
    module is not for files. To keep int4 weights in a file, convert to GGUF's q4_0.
    """

    weight: Tensor  # [outputs, inputs / 2] uint8, packed; outputs are padded to a multiple of 16
    scales_and_zeros: Tensor  # [inputs / group, outputs, 2] in the type of the inputs

    def __init__(self, weight: Tensor, scales_and_zeros: Tensor, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales_and_zeros", scales_and_zeros)
        self.in_features, self.out_features = 2 * weight.shape[1], out_features
        self.group = self.in_features // scales_and_zeros.shape[0]

    @classmethod
    def quantized(cls, weight: Tensor, group: int = 32) -> Int4Linear:
        """Round a matrix [outputs, inputs], each group to 16 levels between its extremes.

        Raises:
            ValueError: the group is not 32, 64 or 128, does not divide the inputs, or the matrix is
                not on the CPU.
        """
        n_out, n_in = weight.shape
        if group not in INT4_GROUPS:
            raise ValueError(f"group = {group}: expected one of {', '.join(map(str, INT4_GROUPS))}")
        if n_in % group:
            raise ValueError(f"{n_in} inputs do not divide into groups of {group}")
        if weight.device.type != "cpu":
            raise ValueError(f"int4 runs on the CPU only, not on {weight.device}")
        n_padded = -(-n_out // 16) * 16
        integers = torch.zeros(n_padded, n_in, dtype=torch.int32)
        scales_and_zeros = torch.zeros(n_in // group, n_padded, 2, dtype=weight.dtype)
        rows = max(1, (1 << 17) // n_in)  # parts stay in the cache
        for start in range(0, n_out, rows):
            part = weight[start : start + rows].float().unflatten(1, (-1, group))
            chosen, scale, zero = _round_groups(part, weight.dtype)
            places = slice(start, start + len(part))
            integers[places] = chosen.flatten(1)
            scales_and_zeros[:, places, 0] = scale[..., 0].T
            scales_and_zeros[:, places, 1] = zero[..., 0].T
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        return cls(packed, scales_and_zeros, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group, self.scales_and_zeros
        )
        return out[:, : self.out_features].view(*x.shape[:-1], self.out_features)


def _round_groups(part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [n, groups, group], and scales and zeros [n, groups, 1] in `dtype`.

    Of a few ranges a little narrower than the values, the one with the least squared error is
    taken: clipping an extreme often costs less than coarser steps for all the others.
    """
    low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
    least = best = None
    for share in (1.0, 0.94, 0.88, 0.82):
        # Both are rounded first: the integers then fit what is really used.
        scale = ((high - low) * share / 15).clamp(min=1e-20).to(dtype)
        zero = ((high + low) / 2 + scale.float() / 2).to(dtype)
        integers = ((part - zero.float()) / scale.float() + 8).round_().clamp_(0, 15)
        restored = (integers - 8) * scale.float() + zero.float()
        error = (restored - part).square().sum(-1, keepdim=True)
        if least is None or best is None:
            least, best = error, (integers, scale, zero)
            continue
        is_better = error < least
        least = torch.where(is_better, error, least)
        pairs = zip((integers, scale, zero), best, strict=True)
        best = tuple(torch.where(is_better, new, old) for new, old in pairs)
    assert best is not None
    return best[0].to(torch.int32), best[1], best[2]


def quantized(weight: Tensor, dtype: str, is_head: bool = False) -> Int8Linear | Int4Linear:
    """The layer for a matrix in "int8" or "int4".

    In int4, the projection to the vocabulary is kept in int8, and so is a matrix that does not
    divide into groups.
    """
    if dtype == "int4" and not is_head and weight.shape[1] % INT4_GROUPS[0] == 0:
        return Int4Linear.quantized(weight)
    return Int8Linear.quantized(weight)
