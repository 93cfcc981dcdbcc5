"""What the compiled products of integers compute, in PyTorch."""

import functools

import torch
import torch.nn.functional as F

from codellama.engine.native import FEW_ROWS, _multiply, library
from codellama.model.quantize import Int8Linear


def rounded(x):
    """What 8 bits with one scale a row make of inputs."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


def matrix_of(linear):
    """What is multiplied by: int4 is brought to 8 bits a row, with eight more behind the point."""
    if isinstance(linear, Int8Linear):
        return linear.weight.float() * linear.scale.float()[:, None]
    n_groups = linear.in_features // linear.group  # without what fills the last chunk
    scales, lows = linear.scales[..., :n_groups].float()[..., None].unbind(1)
    groups = linear.dequantized(torch.float32).unflatten(1, (-1, linear.group))
    integers = ((groups - lows) / scales).round()
    largest = torch.maximum(lows.abs(), (lows + 15 * scales).abs()).amax(1, keepdim=True)
    factors = (scales / largest * 127 * 256).round()
    offsets = (lows / largest * 127 * 256 + 128).round()
    return (((integers * factors + offsets) / 256).floor() * largest / 127).flatten(1)


@functools.cache
def has_tiles():
    """Whether this processor has a matrix unit for integers, and a compiler that knows it."""
    linear = Int8Linear.quantized(torch.ones(16, 16))
    return library() is not None and _multiply(library(), linear, torch.ones(9, 16)) is not None


def multiplied(linear, x):
    """As the step does it: few rows keep their inputs for int8, and round groups of 32 for int4."""
    if len(x) > FEW_ROWS and has_tiles():
        return (rounded(x.float()) @ matrix_of(linear).T).to(x.dtype)
    if isinstance(linear, Int8Linear):
        return None
    wide = F.pad(x.float(), (0, -x.shape[1] % 32)).view(-1, 32)
    groups = rounded(wide).nan_to_num().view(len(x), -1)[:, : x.shape[1]]
    # The lowest values are multiplied by the exact sums.
    lows = linear.scales[:, 1].float().repeat_interleave(linear.group, 1)[:, : x.shape[1]]
    exact = linear.dequantized(torch.float32)
    return (groups @ (exact - lows).T + x.float() @ lows.T).to(x.dtype)
