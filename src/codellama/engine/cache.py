"""The key-value cache, outside of the model: it is what the engine passes as `attend`.

One row a running sequence, all rows padded to the same number of positions. Rows and positions grow
by doubling. A row that ends is overwritten by the last one, so that the running rows always stand
together and no step has to gather them.

    keys, values: [L, rows, Hkv, S, Dh]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from codellama.model.attention import Attend
from codellama.model.config import ModelConfig


class KeyValueCache:
    """Keys and values of the running sequences; row r belongs to the r-th of them."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype) -> None:
        self._config = config
        self._lengths: list[int] = []
        shape = (config.num_hidden_layers, 1, config.num_key_value_heads, 64, config.head_dim)
        self._keys = torch.zeros(shape, device=device, dtype=dtype)
        self._values = torch.zeros_like(self._keys)

    @property
    def lengths(self) -> Sequence[int]:
        """Cached positions of every row."""
        return self._lengths

    @property
    def n_bytes(self) -> int:
        """Memory held by keys and values."""
        return 2 * self._keys.nbytes

    @torch.inference_mode()
    def add_row(self) -> None:
        """Make room for one more sequence, behind the others."""
        self._lengths.append(0)
        self._reserve(len(self._lengths), 0)

    @torch.inference_mode()
    def remove_row(self, row: int) -> None:
        """Forget a sequence; the last row takes its place."""
        last = len(self._lengths) - 1
        if row != last:
            length = self._lengths[last]
            for cached in (self._keys, self._values):
                cached[:, row, :, :length] = cached[:, last, :, :length]
            self._lengths[row] = length
        self._lengths.pop()

    def prefill(self, rows: Sequence[int], counts: Sequence[int]) -> Attend:
        """Attend for the next `counts[i]` tokens of each of some rows: x is [sum(counts), D].

        The projections run over all prompts at once; attention runs prompt by prompt.
        """
        begins = [self._lengths[row] for row in rows]
        ends = [begin + count for begin, count in zip(begins, counts, strict=True)]
        self._reserve(len(self._lengths), max(ends))
        for row, end in zip(rows, ends, strict=True):
            self._lengths[row] = end

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            first = 0
            for row, begin, end in zip(rows, begins, ends, strict=True):
                part = slice(first, first + end - begin)
                keys, values = self._keys[layer, row], self._values[layer, row]
                keys[:, begin:end] = k[part].transpose(0, 1)
                values[:, begin:end] = v[part].transpose(0, 1)
                cached = keys[None, :, :end], values[None, :, :end]
                out[part] = _attend_from(begin, q[part].transpose(0, 1)[None], *cached)[
                    0
                ].transpose(0, 1)
                first = part.stop
            return out

        return attend

    def decode(self) -> Attend:
        """Attend for one new token of every row: x is [rows, D]."""
        n_rows, longest = len(self._lengths), max(self._lengths) + 1
        self._reserve(n_rows, longest)
        device = self._keys.device
        at = torch.tensor(self._lengths, device=device)
        rows = torch.arange(n_rows, device=device)
        is_uniform = min(self._lengths) == longest - 1
        mask = None
        if not is_uniform:
            mask = (torch.arange(longest, device=device)[None] <= at[:, None])[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[rows, :, at] = k
            values[rows, :, at] = v
            cached = keys[:n_rows, :, :longest], values[:n_rows, :, :longest]
            return _attend(q[:, :, None], *cached, mask)[:, :, 0]

        self._lengths = [length + 1 for length in self._lengths]
        return attend

    def _reserve(self, n_rows: int, n_positions: int) -> None:
        """Grow to hold that many rows and positions; what is cached stays."""
        layers, rows, heads, positions, width = self._keys.shape
        if n_rows <= rows and n_positions <= positions:
            return
        rows = rows if n_rows <= rows else max(n_rows, 2 * rows)
        if n_positions > positions:
            limit = max(self._config.max_position_embeddings, n_positions)
            positions = min(max(n_positions, 2 * positions), limit)
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_zeros(layers, rows, heads, positions, width)
            new[:, : old.shape[1], :, : old.shape[3]] = old
            setattr(self, name, new)


def _attend_from(begin: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries at positions `begin`, `begin` + 1, ... over all keys before."""
    if begin == 0:
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    shape = q.shape[2], k.shape[2]
    return _attend(q, k, v, torch.ones(shape, dtype=torch.bool, device=q.device).tril(begin))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q: [B, H, T, Dh]; k, v: [B, Hkv, S, Dh] -> [B, H, T, Dh]."""
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped)
