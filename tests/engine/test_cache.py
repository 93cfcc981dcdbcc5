"""Paged attention against plain attention over the whole sequence, block by block shuffled."""

import random

import pytest
import torch
import torch.nn.functional as F

from codellama.engine import cache as cache_module
from codellama.engine.cache import PagedCache, Span, attend_piece
from codellama.model.config import ModelConfig

SIZE = 16
CONFIG = ModelConfig(64, 2, 4, 2, 8, 10)
# Positions of three sequences that the same pass takes further: parts of prompts and single tokens.
STEPS = [
    [(0, 0, 70), (1, 0, 16)],
    [(0, 70, 71), (1, 16, 131), (2, 0, 1)],
    [(0, 71, 76), (1, 131, 132), (2, 1, 2)],
    [(0, 76, 300), (2, 2, 19)],
    [(0, 300, 301), (1, 132, 133), (2, 19, 20)],
]


def plain(q, k, v):
    """[T, heads, Dh] of one sequence, causally."""
    q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(
        0, 1
    )


_drawn = random.Random(1).sample(range(40), 40)
TABLES = {
    "in order": (range(20), range(20, 30), range(30, 33)),
    "shuffled": (_drawn[:20], _drawn[20:30], _drawn[30:33]),
    # As far apart as if in order, with a stranger between.
    "deceiving": ([4, 39, 6, 5, *range(7, 23)], [24, 38, 26, *range(27, 34)], [35, 36, 37]),
}


@pytest.mark.parametrize("order", TABLES)
@pytest.mark.parametrize(
    ("compute", "stored", "tolerance"),
    [
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 0.03),
        (torch.float32, torch.int8, 0.03),
        (torch.bfloat16, torch.int8, 0.05),
    ],
)
def test_equals_attention_over_the_whole_sequence(compute, stored, tolerance, order, monkeypatch):
    monkeypatch.setattr(cache_module, "PIECE_TOKENS", 128)
    monkeypatch.setattr(cache_module, "VIEW_TOKENS", 48)
    torch.manual_seed(1)
    tables = TABLES[order]
    cache = PagedCache(CONFIG, 40, SIZE, torch.device("cpu"), compute, stored)
    cache.keys.view(torch.uint8).fill_(0x7F)  # what was never written is never used, not even as 0
    q, k, v = (torch.randn(3, 320, heads, 16).to(compute) for heads in (4, 2, 2))
    for step in STEPS:
        attend = cache.attend([Span(tables[s], begin, end) for s, begin, end in step])
        for layer in (1, 0):  # the second would see what the first left
            parts = [[x[s, begin:end] for s, begin, end in step] for x in (q, k, v)]
            out = attend(layer, *(torch.cat(part) for part in parts))
            first = 0
            for s, begin, end in step:
                expected = plain(q[s, :end], k[s, :end], v[s, :end])[begin:]
                got = out[first : first + end - begin].float()
                torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
                first += end - begin


@pytest.mark.parametrize(("n_tokens", "n_cached"), [(1, 40), (7, 40), (33, 33)])
def test_both_ways_to_attend_are_the_same(n_tokens, n_cached):
    """The kernel of the CPU, and the products that stand in for it elsewhere."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, n_tokens, 16)
    k, v = torch.randn(2, 1, 2, n_cached, 16)
    is_causal = n_tokens == n_cached
    flash = attend_piece(q, k, v, is_causal)
    products = cache_module.attend_by_products(q, k, v, is_causal)
    for one, other in zip(flash, products, strict=True):
        torch.testing.assert_close(one, other)


def test_memory_is_what_the_arithmetic_says():
    for dtype, per_token in ((torch.bfloat16, 2 * 2 * 2 * 16 * 2), (torch.int8, 2 * 2 * 2 * 20)):
        cache = PagedCache(CONFIG, 40, SIZE, torch.device("cpu"), torch.bfloat16, dtype)
        held = [cache.keys, cache.values, *(cache.scales or ())]
        assert sum(x.nbytes for x in held) == 40 * SIZE * per_token
        assert PagedCache.bytes_per_token(CONFIG, dtype) == per_token
