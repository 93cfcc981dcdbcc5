"""The measures: pass@k, exact match, edit similarity, BLEU, intervals and a paired test.

Plain functions over numbers and text. They know neither tasks nor files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np

_WORD = re.compile(r"\w+|[^\w\s]")
N_RESAMPLES = 10_000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without putting back, hold one of the c that pass.

    Source: the unbiased estimator of the Codex paper (arXiv 2107.03374), section 2.1.

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} passes in {n} samples: expected c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(
    values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap 95 % confidence interval of the (weighted) mean of one value a problem.

    Problems are drawn with putting back; percentiles of the resampled means. Where all values are
    0, or all 1, that would say nothing of the chance of another one: these have the exact
    interval of a share (Clopper and Pearson).
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    unseen = 1 - 0.025 ** (1 / len(values))
    if set(values) in ({0.0}, {1.0}):
        return (0.0, unseen) if values[0] == 0 else (1 - unseen, 1.0)
    shares = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    numbers = np.asarray(values, dtype=np.float64) * shares
    rng = np.random.default_rng(seed)
    means = np.empty(N_RESAMPLES)
    for begin in range(0, N_RESAMPLES, 1000):  # 1000 x 5815 problems x 8 bytes: 47 MB a part
        drawn = rng.integers(len(numbers), size=(min(1000, N_RESAMPLES - begin), len(numbers)))
        means[begin : begin + len(drawn)] = numbers[drawn].sum(1) / shares[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_p_value(a: Sequence[float], b: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value for the means of two models over the same problems being equal.

    The signs of the differences are flipped at random: exact for up to 12 differences, and for
    differences of one size (pass or fail, where it is McNemar's exact test); drawn otherwise.

    Raises:
        ValueError: different numbers of problems.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values: expected the same problems in both")
    # Decimals such as 0.1 + 0.2 would make sums differ that are the same.
    differences = [round(x - y, 12) for x, y in zip(a, b, strict=True)]
    differences = [d for d in differences if d]
    if not differences:
        return 1.0
    observed = abs(sum(differences)) * (1 - 1e-12)
    sizes = np.abs(differences)
    n = len(sizes)
    if np.all(sizes == sizes[0]):
        n_up = sum(d > 0 for d in differences)
        tail = sum(math.comb(n, i) for i in range(min(n_up, n - n_up) + 1))
        return min(1.0, 2 * tail / 2**n)
    if n <= 12:
        sums = [abs(float(np.dot(signs, sizes))) for signs in product((-1, 1), repeat=n)]
        return sum(value >= observed for value in sums) / 2**n
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(N_RESAMPLES, n))
    return (1 + int((np.abs(signs @ sizes) >= observed).sum())) / (N_RESAMPLES + 1)


def exact_match(text: str, reference: str) -> float:
    """1.0 where the texts agree without the white space around them."""
    return float(text.strip() == reference.strip())


def edit_similarity(text: str, reference: str) -> float:
    """Share of characters that need no insertion or deletion, 0 to 1; two empty texts agree.

    Twice the longest common subsequence over both lengths, as the ratio of the Levenshtein and
    fuzzywuzzy packages. Source: the line completion tasks of CodeXGLUE and LongBench.
    """
    if not text and not reference:
        return 1.0
    # One bit a character of the reference: Hyyrö's bit-parallel longest common subsequence.
    positions: dict[str, int] = {}
    for place, char in enumerate(reference):
        positions[char] = positions.get(char, 0) | 1 << place
    all_ones = row = (1 << len(reference)) - 1
    for char in text:
        matches = row & positions.get(char, 0)
        row = (row + matches | row - matches) & all_ones
    n_common = len(reference) - row.bit_count()
    return 2 * n_common / (len(text) + len(reference))


def smoothed_bleu(text: str, reference: str) -> float:
    """Sentence BLEU-4 of lower-cased words and signs, 0 to 1, as CodeXGLUE's evaluator has it.

    From two words on, one is added to the matches and to the totals; the brevity penalty adds one
    to both lengths. The evaluator gives a text without words 0.05 or more; here it has 0.
    """
    words, expected = (_WORD.findall(t.strip().lower()) for t in (text, reference))
    if not words:
        return 0.0
    tiny = 2.2250738585072014e-308  # keeps the logarithm of no match finite
    log_bleu = 0.0
    for n in range(1, 5):
        got, wanted = _n_grams(words, n), _n_grams(expected, n)
        n_matches, n_total = sum((got & wanted).values()), sum(got.values())
        plus = int(n > 1)
        log_bleu += math.log(n_matches + plus + tiny) - math.log(n_total + plus + tiny)
    brevity = min(0.0, 1 - (len(expected) + 1) / (len(words) + 1))
    return math.exp(log_bleu / 4 + brevity)


def _n_grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
