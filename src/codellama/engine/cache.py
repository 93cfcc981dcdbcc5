"""The paged key-value cache, outside of the model: it is what the engine passes as `attend`.

Tokens of any number of sequences run together as one ragged [N]. Each sequence's keys and values
lie in blocks that `blocks` hands out; a block is `block_tokens` consecutive slots of each head:

    keys, values: [L, Hkv, n_blocks * block_tokens, Dh]     scales (int8 only): without Dh

Memory is that of the slots in use, and attention never makes a buffer that grows with the square
of the length: what stands before a part of a prompt is attended to in pieces, merged by their sums
of exponentials.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from codellama.model.attention import LENGTH_STEP, Attend
from codellama.model.config import ModelConfig

PIECE_TOKENS = 4096  # positions that are attended to at a time; bounds every copy of cached values
VIEW_TOKENS = 128  # consecutive slots from which on a view is better than a copy
Piece = slice | Tensor


@dataclass(frozen=True)
class Span:
    """The next tokens of one sequence: positions begin .. end - 1."""

    blocks: Sequence[int]
    begin: int
    end: int


class PagedCache:
    """Keys and values of all sequences.

    Args:
        compute_dtype: what the model computes in.
        dtype: what is stored: the same, bfloat16, or int8 with a scale for each token and head.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        block_tokens: int,
        device: torch.device,
        compute_dtype: torch.dtype,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.block_tokens, self._compute_dtype = block_tokens, compute_dtype
        shape = (config.num_hidden_layers, config.num_key_value_heads, n_blocks * block_tokens)
        dtype = dtype or compute_dtype
        # Not zeros: on the CPU, slots that were never written then take no memory.
        self.keys, self.values = (
            torch.empty(*shape, config.head_dim, device=device, dtype=dtype) for _ in range(2)
        )
        self.scales = None
        if dtype == torch.int8:
            self.scales = tuple(torch.empty(shape, device=device) for _ in range(2))

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Cache bytes of one position, scales included."""
        scale_bytes = 4 / config.head_dim if dtype == torch.int8 else 0
        return config.kv_bytes_per_token(dtype.itemsize + scale_bytes)

    def slots(self, spans: Sequence[Span]) -> list[int]:
        """Where the tokens of these spans are kept."""
        size = self.block_tokens
        return [
            s.blocks[at // size] * size + at % size for s in spans for at in range(s.begin, s.end)
        ]

    def attend(self, spans: Sequence[Span]) -> Attend:
        """Attend for the tokens of these spans, which follow one another in q, k and v [N, ...].

        Each token sees all tokens before it in its own sequence, which must be cached already or
        stand in the span.
        """
        slots = self._index(self.slots(spans))
        plan = [self._pieces(span) for span in spans]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, slots, k, v)
            out = torch.empty_like(q)
            first = 0
            for span, (before, own) in zip(spans, plan, strict=True):
                last = first + span.end - span.begin
                out[first:last] = self._attend_span(layer, q[first:last], before, own)
                first = last
            return out

        return attend

    def _pieces(self, span: Span) -> tuple[list[Piece], list[Piece]]:
        """What a span attends to: all of the first pieces, and causally the second ones.

        A single token sees everything, itself included, so that nothing is left to be causal.
        """
        if span.end - span.begin == 1:
            return self._pieces_of(span.blocks, 0, span.end), []
        own = self.slots([span])
        run = range(own[0], own[0] + len(own))
        place = slice(run.start, run.stop) if own == [*run] else self._index(own)
        return self._pieces_of(span.blocks, 0, span.begin), [place]

    def _pieces_of(self, blocks: Sequence[int], begin: int, end: int) -> list[Piece]:
        """Slots of positions begin .. end - 1, in any order: long runs as slices, the rest as
        numbers.
        """
        size = self.block_tokens
        pieces: list[Piece] = []
        loose: list[int] = []
        at = begin
        while at < end:
            number = at // size
            first = number
            while (number + 1) * size < end and blocks[number + 1] == blocks[number] + 1:
                number += 1
            stop = min((number + 1) * size, end)
            slot = blocks[first] * size
            for part in range(slot, slot + stop - at, PIECE_TOKENS):
                part_end = min(part + PIECE_TOKENS, slot + stop - at)
                if part_end - part >= VIEW_TOKENS or (at == 0 and stop == end):
                    pieces.append(slice(part, part_end))
                else:
                    loose += range(part, part_end)
            at = stop
        parts = range(0, len(loose), PIECE_TOKENS)
        return [*pieces, *(self._index(loose[part : part + PIECE_TOKENS]) for part in parts)]

    def _index(self, slots: list[int]) -> Tensor:
        return torch.tensor(slots, device=self.keys.device)

    def _write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if self.scales is None:
            self.keys[layer].index_copy_(1, slots, k.to(self.keys.dtype))
            self.values[layer].index_copy_(1, slots, v.to(self.values.dtype))
            return
        for store, scales, x in zip((self.keys, self.values), self.scales, (k, v), strict=True):
            scale = (x.float().abs().amax(-1) / 127).clamp(min=1e-20)
            integers = (x.float() / scale[..., None]).round_()
            store[layer].index_copy_(1, slots, integers.to(torch.int8))
            scales[layer].index_copy_(1, slots, scale)

    def _read(self, layer: int, piece: Piece) -> list[Tensor]:
        """Keys and values [1, Hkv, n, Dh] of some slots."""
        both = [_select(x[layer], piece) for x in (self.keys, self.values)]
        if self.scales is not None:
            scales = [_select(x[layer], piece) for x in self.scales]
            both = [x * scale[..., None] for x, scale in zip(both, scales, strict=True)]
        return [x.to(self._compute_dtype)[None] for x in both]

    def _attend_span(
        self, layer: int, q: Tensor, before: Sequence[Piece], own: Sequence[Piece]
    ) -> Tensor:
        """q: [n, H, Dh] -> the same shape."""
        n_tokens = len(q)
        # The kernels of the CPU are generated for each new length and kept: 200 MB after 60 prompts
        # of different lengths. Padded ends are never seen by what stands before them.
        n_padding = -n_tokens % LENGTH_STEP if n_tokens > 1 else 0
        q = F.pad(q, (0, 0, 0, 0, 0, n_padding)).transpose(0, 1)[None]
        total = log_sum = None
        for pieces, is_causal in ((before, False), (own, True)):
            for piece in pieces:
                k, v = self._read(layer, piece)
                if is_causal:
                    k, v = (F.pad(x, (0, 0, 0, n_padding)) for x in (k, v))
                out, out_log_sum = attend_piece(q, k, v, is_causal)
                if total is None or log_sum is None:
                    total, log_sum = out, out_log_sum
                    continue
                both = torch.logaddexp(log_sum, out_log_sum)
                total = total.float() * (log_sum - both).exp()[..., None]
                total += out.float() * (out_log_sum - both).exp()[..., None]
                log_sum = both
        assert total is not None
        return total[0].transpose(0, 1)[:n_tokens]


def _select(x: Tensor, piece: Piece) -> Tensor:
    return x[:, piece] if isinstance(piece, slice) else x.index_select(1, piece)


def attend_piece(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attention to some of the positions, and the logarithm of its sum of exponentials.

    Args:
        q: [1, H, T, Dh].
        k: [1, Hkv, S, Dh]; with `is_causal`, S equals T.
        v: as k.

    Returns:
        [1, H, T, Dh] and [1, H, T] float32.
    """
    if q.device.type == "cpu" and q.dtype != torch.float16:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    return attend_by_products(q, k, v, is_causal)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """As `attend_piece`, where there is no kernel that returns the sums."""
    n_heads, n_tokens, width = q.shape[1:]
    grouped = q.reshape(k.shape[1], -1, width)  # [Hkv, G * T, Dh]: one product for each key head
    scores = (grouped @ k[0].transpose(1, 2)).view(n_heads, n_tokens, -1).float() / math.sqrt(width)
    if is_causal:
        later = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum[..., None]).exp().to(v.dtype).view(k.shape[1], -1, v.shape[2])
    return (weights @ v[0]).view(q.shape), log_sum[None]


def available_bytes(device: torch.device) -> int:
    """Memory that a cache may take: half of what is free, on a GPU nine tenths."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 9 // 10
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return kilobytes * 1024 // 2
    except (OSError, StopIteration):  # not Linux: a quarter of all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
