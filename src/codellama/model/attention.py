"""Attention as an argument of the model.

The model computes rotated queries, keys and values and calls `attend(layer, q, k, v)`. This file
holds the functions that training passes; the engine passes one that reads and writes its cache.

    q: [B, T, H, Dh]   k, v: [B, T, Hkv, Dh]   ->   [B, T, H, Dh]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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


def within_documents(document_ids: Tensor, may_compile: bool = False) -> Attend:
    """Causal attention that never crosses from one packed document into another.

    Args:
        document_ids: [B, T] int64; positions of one document stand together and share an id.
        may_compile: whether gradients may be worked out by generated code, which is faster.
    """
    if document_ids.device.type == "cpu":
        return lambda layer, q, k, v: _per_document(q, k, v, document_ids, may_compile)[0]
    n_positions = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    ordered = torch.ones(n_positions, n_positions, dtype=torch.bool, device=same.device).tril()
    mask = (same & ordered)[:, None]  # [B, 1, T, T]
    return lambda layer, q, k, v: _attend(q, k, v, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over [B, T, heads, Dh]; key-value heads are shared."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[-3] != k.shape[-3]
    )
    return out.transpose(-3, -2)


# On the CPU every document is attended to on its own: half the work of a mask at documents of 400
# tokens in contexts of 1,024, and the causal kernel beside it (46 against 80 ms a layer, forward
# and backward, B = 8). Wrapped as an operator so that torch.compile does not trace the loop.
# The kernels are generated for every new length and kept: with lengths as they come that cost
# 1.2 GB and 2.4 times the time, so documents are filled up to few different lengths, and those of
# one length go together.

# The flash kernel's backward hardly uses the matrix units: plain products, fused, take half of its
# time at documents of 64 and 128 tokens and four fifths at 192, but more from 256 on.

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LENGTH_STEP = 64
PRODUCT_TOKENS = 192  # documents up to this many
PRODUCT_CHUNK = 2048  # tokens at a time, so that what lies between the products stays in the cache


class _Group(NamedTuple):
    """Documents of nearly one length, in a batch flattened to [B * T]."""

    shape: tuple[int, int]
    """[n, T'], the padded length."""
    positions: Tensor
    """[n * T']: behind its end a document repeats its last position."""
    own: Tensor
    """Which of these are its own; causal attention never sees the others."""

    def take(self, x: Tensor) -> Tensor:
        """[B * T, heads, …] -> [n, heads, T', …]."""
        return x.index_select(0, self.positions).unflatten(0, self.shape).transpose(1, 2)

    def put(self, into: Tensor, x: Tensor) -> None:
        """The other way."""
        values = x.transpose(1, 2).flatten(0, 1).index_select(0, self.own)
        into.index_copy_(0, self.positions[self.own], values)


def _by_length(document_ids: Tensor) -> list[_Group]:
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = is_start.flatten().nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([document_ids.numel()])])
    padded = (ends - starts + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
    groups: list[_Group] = []
    for length in padded.unique().tolist():
        of_length = padded == length
        places, last = starts[of_length, None] + torch.arange(length), ends[of_length, None] - 1
        own = (places <= last).flatten().nonzero()[:, 0]
        groups.append(_Group((len(places), length), places.minimum(last).flatten(), own))
    return groups


def _sum_type(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@torch.library.custom_op("codellama::per_document_attention", mutates_args=())
def _per_document(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, may_compile: bool
) -> tuple[Tensor, Tensor]:
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = flat[0].new_empty(flat[0].shape)
    log_sums = out.new_empty(out.shape[:2], dtype=_sum_type(q))
    for group in _by_length(document_ids):
        part, log_sum = _flash(*map(group.take, flat), 0.0, True)
        group.put(out, part)
        group.put(log_sums, log_sum)
    return out.view_as(q), log_sums


def _by_products(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal attention for q, k, v, from matrices [T', T'] of every document and head.

    Args:
        gradient, q, out: [n, H, T', Dh]. k, v: [n, Hkv, T', Dh]. log_sums: [n, H, T'], exact.
    """
    n, n_heads, length, dim = q.shape
    n_kv, exact = k.shape[1], log_sums.dtype
    grouped = (n * n_kv, n_heads // n_kv, length, length)
    rest = (out.to(exact) * gradient.to(exact)).sum(-1).view(*grouped[:3], 1)
    q, gradient = (x.reshape(n * n_kv, -1, dim) for x in (q, gradient))
    k, v = (x.reshape(n * n_kv, length, dim) for x in (k, v))
    scale = dim**-0.5
    scores = (q @ k.mT).view(grouped).to(exact) * scale - log_sums.reshape(*grouped[:3], 1)
    places = torch.arange(length)
    weights = torch.where(places[None] <= places[:, None], scores.exp(), 0.0)
    for_scores = weights * ((gradient @ v.mT).view(grouped).to(exact) - rest) * scale
    for_scores = for_scores.to(q.dtype).view(n * n_kv, -1, length)
    weights = weights.to(q.dtype).view(n * n_kv, -1, length)
    return (
        (for_scores @ k).view(n, n_heads, length, dim),
        (for_scores.mT @ q).view(n, n_kv, length, dim),
        (weights.mT @ gradient).view(n, n_kv, length, dim),
    )


@functools.cache
def _products() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_by_products, dynamic=True)


@torch.library.custom_op("codellama::per_document_attention_backward", mutates_args=())
def _per_document_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    document_ids: Tensor,
    may_compile: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    flat = [x.flatten(0, 1) for x in (gradient, q, k, v, out)] + [log_sums]
    results = [x.new_empty(x.shape) for x in flat[1:4]]
    for group in _by_length(document_ids):
        n, length = group.shape
        documents = [group.take(x) for x in flat]
        own = torch.zeros(n * length, dtype=gradient.dtype).index_fill_(0, group.own, 1)
        documents[0].mul_(own.view(n, 1, length, 1))  # what was filled in teaches nothing
        if may_compile and length <= PRODUCT_TOKENS:
            chunks = zip(*(x.split(PRODUCT_CHUNK // length) for x in documents), strict=True)
            parts = map(torch.cat, zip(*(_products()(*chunk) for chunk in chunks), strict=True))
        else:
            parts = _flash_backward(*documents, 0.0, True)
        for result, part in zip(results, parts, strict=True):
            group.put(result, part)
    return results[0].view_as(q), results[1].view_as(k), results[2].view_as(v)


@_per_document.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, may_compile: bool
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0] * q.shape[1], q.shape[2])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=_sum_type(q))


@_per_document_backward.register_fake
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    document_ids: Tensor,
    may_compile: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.may_compile = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, document_ids, out, log_sums = ctx.saved_tensors
    gradients = _per_document_backward(
        gradient.contiguous(), q, k, v, out, log_sums, document_ids, ctx.may_compile
    )
    return *gradients, None, None


_per_document.register_autograd(_differentiate, setup_context=_keep_for_backward)
