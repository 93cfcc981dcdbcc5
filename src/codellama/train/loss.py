"""Next-token cross-entropy that never holds the logits of a whole batch.

The output projection, the loss and the gradients of both are computed together for a chunk of
positions at a time: with V = 8,196 and 8,192 positions the logits alone would be 268 MB, and a
chunk of them stays in the processor's cache. Measured on two cores (docs/results/train_step.md):
1.35 times torch's own chunked `linear_cross_entropy`, 1.1 times the compiled loss over all logits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codellama.data.loader import Batch
from codellama.model.attention import Attend, causal, within_documents
from codellama.model.checkpoint import DTYPES
from codellama.model.transformer import Transformer
from codellama.recipe import Stage
from codellama.train.parallel import ALONE, Layout, over_contexts, own_positions

CHUNK_TOKENS = 1024  # 512 and 1,024 measured alike, 2,048 and more slower

ChunkLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def chunk_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss of a chunk with its gradients, worked out by hand so that they fuse.

    Args:
        hidden: [N, D]. weight: [V, D]. targets: [N] int64. weights: [N] float32, the share of each
            position in the loss.

    Returns:
        The summed loss, its gradient for `hidden`, and for `weight`.
    """
    logits = F.linear(hidden, weight).float()
    log_total = logits.logsumexp(-1)
    loss = (log_total - logits.gather(-1, targets[:, None])[:, 0]).mul(weights).sum()
    probabilities = torch.exp(logits - log_total[:, None])
    vocabulary = torch.arange(weight.shape[0], device=weight.device)
    is_target = vocabulary[None] == targets[:, None]
    gradient = ((probabilities - is_target.float()) * weights[:, None]).to(hidden.dtype)
    return loss, gradient @ weight, gradient.t() @ hidden


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        chunk: ChunkLoss,
    ) -> Tensor:
        cast_weight = weight.to(dtype)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), CHUNK_TOKENS):
                part = slice(begin, begin + CHUNK_TOKENS)
                loss, for_hidden, for_weight = chunk(
                    hidden[part].to(dtype), cast_weight, targets[part], weights[part]
                )
                total += loss
                hidden_gradient[part] = for_hidden
                weight_gradient += for_weight  # summed over chunks in float32
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradients[0]
        return hidden_gradient * scale, weight_gradient * scale, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
    chunk: ChunkLoss = chunk_loss,
) -> Tensor:
    """The weighted sum of next-token losses in nats.

    Args:
        hidden: [N, D]. weight: [V, D]. targets: [N] int64.
        weights: [N] float32; 1 / (number of predicted tokens) gives the mean, 0 leaves one out.
        dtype: what the matrix products are computed in.
        chunk: `chunk_loss` or a compiled version of it.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, dtype, chunk)  # type: ignore[return-value]


class LossFunction:
    """Batch to loss: compiled where a C++ compiler exists, in the stage's precision."""

    def __init__(self, model: Transformer, stage: Stage, layout: Layout = ALONE) -> None:
        self._model = model
        self._layout = layout
        self._dtype = DTYPES[stage.dtype]
        self._document_mask = stage.document_mask
        self._hidden: Any = self._decode
        self._chunk: Any = chunk_loss
        self._may_compile = stage.compile and can_compile()
        if self._may_compile:
            self._chunk = torch.compile(chunk_loss)
            if layout.is_alone:  # else blocks are compiled one by one, see parallel.py
                self._hidden = torch.compile(self._decode, dynamic=False)

    def _decode(self, tokens: Tensor, positions: Tensor, document_ids: Tensor) -> Tensor:
        attend: Attend = causal
        if self._document_mask:
            attend = within_documents(document_ids, self._may_compile)
        return self._model.model(tokens, positions, over_contexts(attend, self._layout))

    def __call__(self, batch: Batch, weights: Tensor) -> Tensor:
        """The weighted sum of the batch's losses. weights: [B, T] float32."""
        positions = batch.positions
        if not self._document_mask:  # attention across documents needs positions that go on
            positions = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights)
        whole = batch.tokens, batch.targets, positions, weights
        tokens, targets, positions, weights = (own_positions(x, self._layout) for x in whole)
        device = tokens.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            hidden = self._hidden(tokens, positions, batch.document_ids)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self._model.lm_head.weight,
            targets.flatten(),
            weights.flatten(),
            self._dtype,
            self._chunk,
        )


def can_compile() -> bool:
    """Whether torch.compile can build code for the CPU here: it needs a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
