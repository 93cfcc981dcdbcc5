"""Attention as an argument of the model.

The model computes rotated queries, keys and values and calls `attend(layer, q, k, v)`. This file
holds the functions that training passes; the engine passes one that reads and writes its cache.

    q: [..., T, H, Dh]   k, v: [..., T, Hkv, Dh]   ->   [..., T, H, Dh]
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """What the model calls once in every layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attended values, shaped as `q`."""
        ...


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position attends to itself and to all before it in its sequence."""
    return _attend(q, k, v, mask=None)


def within_documents(document_ids: Tensor) -> Attend:
    """Causal attention that never crosses from one packed document into another.

    Args:
        document_ids: [B, T] int64; positions of one document share an id.
    """
    n_positions = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    ordered = torch.ones(n_positions, n_positions, dtype=torch.bool, device=same.device).tril()
    mask = (same & ordered)[:, None]  # [B, 1, T, T]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, mask)

    return attend


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over [B, T, heads, Dh]; key-value heads are shared."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[-3] != k.shape[-3]
    )
    return out.transpose(-3, -2)
