"""The measures against enumeration, brute force and published results."""

import random
from itertools import combinations, product
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codellama.eval import metrics


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_pass(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert metrics.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_does_not_overflow():
    assert metrics.pass_at_k(100_000, 1, 1) == pytest.approx(1e-5)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="expected"):
        metrics.pass_at_k(n, c, k)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for trial in range(60):
        low, high = metrics.interval([float(rng.random() < 0.3) for _ in range(100)], seed=trial)
        hits += low <= 0.3 <= high
    assert 52 <= hits <= 60  # 95 % of 60 is 57


def test_interval_of_equal_values_is_a_point():
    assert metrics.interval([0.5] * 10) == (0.5, 0.5)


def test_interval_where_none_or_all_passed():
    """Known values: the rule of three's exact form, for 0 of 164."""
    low, high = metrics.interval([0.0] * 164)
    assert (low, round(high, 4)) == (0.0, 0.0222)
    assert metrics.interval([1.0] * 164) == pytest.approx((1 - high, 1.0))


def enumerated_p(a, b):
    differences = [x - y for x, y in zip(a, b, strict=True)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return mean(s >= abs(sum(differences)) - 1e-9 for s in sums)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=10))
def test_paired_test_of_passes_is_exact(pairs):
    a, b = zip(*pairs, strict=True)
    assert metrics.paired_p_value(a, b) == pytest.approx(enumerated_p(a, b))


def test_paired_test_of_shares():
    rng = random.Random(1)
    a, b = ([rng.randint(0, 10) / 10 for _ in range(10)] for _ in range(2))
    assert metrics.paired_p_value(a, b) == pytest.approx(enumerated_p(a, b))
    a, b = ([rng.randint(0, 10) / 10 for _ in range(16)] for _ in range(2))
    assert metrics.paired_p_value(a, b) == pytest.approx(enumerated_p(a, b), abs=0.02)


def test_paired_test_needs_the_same_problems():
    with pytest.raises(ValueError, match="same problems"):
        metrics.paired_p_value([1.0], [1.0, 0.0])


def common_subsequence(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


@given(st.text("abcd", max_size=70), st.text("abcd", max_size=70))
def test_edit_similarity_against_the_table(a, b):
    expected = 2 * common_subsequence(a, b) / (len(a) + len(b)) if a or b else 1.0
    assert metrics.edit_similarity(a, b) == pytest.approx(expected)


def test_bleu_of_the_published_example(shared_data):
    texts = [
        dict(line.split("\t", 1) for line in path.read_text().splitlines())
        for path in sorted((shared_data / "codexglue").glob("code-to-text-evaluator-*.txt"))
    ]
    values = [metrics.smoothed_bleu(texts[0][key], texts[1][key]) for key in texts[1]]
    assert 100 * mean(values) == pytest.approx(9.554726113590661)  # CodeXGLUE code-to-text README


def test_bleu_ends():
    assert metrics.smoothed_bleu("return the sum of two", "Return the sum of two") == 1
    assert metrics.smoothed_bleu(" \n", "Return the sum") == 0
    assert metrics.smoothed_bleu("quite other words", "Return the sum") < 1e-50
