"""Weight-only int8: a linear layer that holds its matrix as integers with one scale per output.

Half the memory of bfloat16. Inputs, outputs and everything else stay in the floating-point type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW_ROWS = 8  # up to here the packed kernel of the CPU is the faster one, measured at 4096 x 11008


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
        if rows.device.type == "cpu" and 0 < rows.shape[0] <= _FEW_ROWS:
            out = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            out = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return out.view(*x.shape[:-1], out.shape[-1])
