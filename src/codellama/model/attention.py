"""Attention as an argument of the model.

The model computes rotated queries, keys and values and calls `attend(layer, q, k, v)`. This file
holds the functions that training passes; the engine passes one that reads and writes its cache.

    q: [B, T, H, Dh]   k, v: [B, T, Hkv, Dh]   ->   [B, T, H, Dh]
"""

from __future__ import annotations

from typing import Any, Protocol

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
        document_ids: [B, T] int64; positions of one document stand together and share an id.
    """
    if document_ids.device.type == "cpu":
        return lambda layer, q, k, v: _per_document(q, k, v, document_ids)[0]
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
# 1.2 GB and 2.4 times the time, so documents are padded with zeros, which causal attention never
# sees from before, to few different lengths.

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LENGTH_STEP = 64


def _spans(document_ids: Tensor) -> list[tuple[int, int]]:
    """[begin, end) of every document in the flattened batch."""
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = is_start.flatten().nonzero()[:, 0].tolist()
    return list(zip(starts, [*starts[1:], document_ids.numel()], strict=True))


def _heads_first(x: Tensor, span: tuple[int, int]) -> Tensor:
    """[B * T, heads, Dh] -> one document [1, heads, T', Dh], padded with zeros at its end."""
    n_padding = (span[0] - span[1]) % LENGTH_STEP
    return F.pad(x[span[0] : span[1]], (0, 0, 0, 0, 0, n_padding)).transpose(0, 1)[None]


def _sum_type(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@torch.library.custom_op("codellama::per_document_attention", mutates_args=())
def _per_document(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out = flat_q.new_empty(flat_q.shape)
    log_sums = flat_q.new_empty(flat_q.shape[1], len(flat_q), dtype=_sum_type(q))
    for begin, end in _spans(document_ids):
        document = (_heads_first(x, (begin, end)) for x in (flat_q, flat_k, flat_v))
        part, log_sum = _flash(*document, 0.0, True)
        out[begin:end] = part[0, :, : end - begin].transpose(0, 1)
        log_sums[:, begin:end] = log_sum[0, :, : end - begin]
    return out.view_as(q), log_sums


@torch.library.custom_op("codellama::per_document_attention_backward", mutates_args=())
def _per_document_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    document_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    flat = [x.flatten(0, 1) for x in (gradient, q, k, v, out)]
    results = [x.new_empty(x.shape) for x in flat[1:4]]
    for begin, end in _spans(document_ids):
        document = [_heads_first(x, (begin, end)) for x in flat]
        log_sum = F.pad(log_sums[None, :, begin:end], (0, (begin - end) % LENGTH_STEP))
        parts = _flash_backward(*document, log_sum, 0.0, True)
        for result, part in zip(results, parts, strict=True):
            result[begin:end] = part[0, :, : end - begin].transpose(0, 1)
    return results[0].view_as(q), results[1].view_as(k), results[2].view_as(v)


@_per_document.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    n_tokens = q.shape[0] * q.shape[1]
    return q.new_empty(q.shape), q.new_empty(q.shape[2], n_tokens, dtype=_sum_type(q))


@_per_document_backward.register_fake
def _(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    document_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, document_ids, out, log_sums = ctx.saved_tensors
    gradients = _per_document_backward(gradient.contiguous(), q, k, v, out, log_sums, document_ids)
    return *gradients, None


_per_document.register_autograd(_differentiate, setup_context=_keep_for_backward)
