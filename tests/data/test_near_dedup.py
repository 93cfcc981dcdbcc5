"""Near duplicates against brute force over real files, and the rules of which one stays."""

import random
import sysconfig
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from codellama.data.near_dedup import _BLANKS, representatives, signatures
from codellama.recipe import NearDuplicates

SETTINGS = NearDuplicates()


def shingles(text: str) -> set[tuple[bytes, ...]]:
    words = text.encode().translate(_BLANKS).split()
    n = SETTINGS.ngram
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def similarities(texts: list[str]) -> dict[tuple[int, int], float]:
    """Exact Jaccard similarity of all pairs that share a shingle."""
    sets = [shingles(text) for text in texts]
    where: dict[tuple[bytes, ...], list[int]] = defaultdict(list)
    for index, shingle_set in enumerate(sets):
        for shingle in shingle_set:
            where[shingle].append(index)
    shared: Counter[tuple[int, int]] = Counter()
    for indices in where.values():
        shared.update((a, b) for i, a in enumerate(indices) for b in indices[i + 1 :])
    return {(a, b): n / (len(sets[a]) + len(sets[b]) - n) for (a, b), n in shared.items()}


def real_texts(n_texts: int) -> list[str]:
    """Real files and edited copies of them."""
    rng = random.Random(0)
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.glob("*/*.py") if 500 < f.stat().st_size < 20_000)
    texts = []
    for file in rng.sample(files, n_texts):
        text = file.read_bytes().decode("utf-8", "ignore")
        texts.append(text)
        words = text.split(" ")
        for _ in range(rng.randrange(1 + len(words) // 50)):
            words[rng.randrange(len(words))] = f"edit{rng.randrange(10**6)}"
        texts.append(" ".join(words))
    return texts


def test_recall_and_precision_against_brute_force() -> None:
    texts = real_texts(200)
    exact = similarities(texts)
    wanted = {pair for pair, value in exact.items() if value >= SETTINGS.threshold}
    sizes = np.array([len(text) for text in texts])
    chosen = representatives(signatures(texts, SETTINGS), np.zeros(len(texts)), sizes, SETTINGS)
    clusters: dict[int, list[int]] = defaultdict(list)
    for index, representative in enumerate(chosen.tolist()):
        clusters[representative].append(index)
    found = {(a, b) for m in clusters.values() for i, a in enumerate(m) for b in m[i + 1 :]}
    assert len(wanted) > 80
    assert len(found & wanted) >= 0.95 * len(wanted)
    # The estimate's standard deviation is 0.025; members of a cluster may be joined by a third.
    near = {pair for pair, value in exact.items() if value >= SETTINGS.threshold - 0.08}
    assert len(found - near) <= 0.02 * len(found)
    for representative, members in clusters.items():
        assert sizes[representative] == sizes[members].max()


def test_the_estimate_is_that_of_the_jaccard_similarity() -> None:
    texts = real_texts(40)
    found = signatures(texts, SETTINGS)
    exact = similarities(texts)
    pairs = [pair for pair, value in exact.items() if 0.2 < value < 1]
    assert len(pairs) > 20
    errors = [(found[a] == found[b]).mean() - exact[a, b] for a, b in pairs]
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.04


def made(*groups: str) -> tuple[np.ndarray, np.ndarray]:
    """Signatures whose similarity is the share of equal letters: 256 hashes, 32 bands of 8.

    Each letter stands for 64 hashes, so that all candidates of three equal letters are alike.
    """
    rows = [
        [ord(c) * 7 + i % 3 for c in name for i in range(64)] for g in groups for name in g.split()
    ]
    group = [n for n, g in enumerate(groups) for _ in g.split()]
    return np.array(rows, np.uint32), np.array(group)


LOOSE = NearDuplicates(threshold=0.75)


def test_chains_are_one_cluster_and_the_longest_stays() -> None:
    rows, group = made("aaaa aaab aabb zzzz")  # the first and the third are alike by half
    chosen = representatives(rows, group, np.array([5, 7, 6, 1]), LOOSE)
    assert chosen.tolist() == [1, 1, 1, 3]
    chosen = representatives(rows, group, np.array([7, 7, 7, 1]), LOOSE)
    assert chosen.tolist() == [0, 0, 0, 3]


def test_a_later_group_never_changes_an_earlier_one() -> None:
    # `aaab` would join `aaaa` and `aabb`, and is the longest; both were there before.
    rows, group = made("aaaa aabb", "aaab qqqq", "qqqr aaaa")
    chosen = representatives(rows, group, np.array([1, 1, 9, 5, 9, 9]), LOOSE)
    assert chosen.tolist()[:2] == [0, 1]
    assert chosen[2] in (0, 1)
    assert chosen.tolist()[3:] == [3, 3, 0]


def test_a_cluster_with_one_that_was_there_before_goes_whole() -> None:
    rows, group = made("aaaa", "aaab aabb")  # the last resembles the kept one by half only
    assert representatives(rows, group, np.array([1, 9, 9]), LOOSE).tolist() == [0, 0, 0]


def test_fixed_rows_stay_though_they_are_alike() -> None:
    rows, group = made("aaaa aaaa", "aaab bbbb")
    chosen = representatives(rows, group, np.array([1, 1, 9, 9]), LOOSE, n_fixed=2)
    assert chosen[2] in (0, 1)
    assert chosen[[0, 1, 3]].tolist() == [0, 1, 3]


def test_thousands_of_copies_are_not_compared_each_with_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.tile(np.arange(256, dtype=np.uint32), (20_000, 1))
    chosen = representatives(rows, np.zeros(len(rows)), np.ones(len(rows)), SETTINGS)
    assert (chosen == 0).all()


def test_the_result_is_the_components_of_all_candidate_pairs() -> None:
    """Random signatures over few values, against comparing everything with everything."""
    rng = np.random.default_rng(0)
    settings = NearDuplicates(n_hashes=16, n_bands=8, threshold=0.5)  # of sd 0.125
    for _ in range(20):
        rows = rng.integers(0, 3, (60, 16)).astype(np.uint32)
        parent = list(range(60))

        def root(i: int, parent: list[int] = parent) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for a in range(60):
            for b in range(a):
                same = rows[a] == rows[b]
                if same.reshape(8, 2).all(axis=1).any() and same.mean() >= 0.25:
                    parent[max(root(a), root(b))] = min(root(a), root(b))
        chosen = representatives(rows, np.zeros(60), np.ones(60), settings)
        assert chosen.tolist() == [root(i) for i in range(60)]


def test_short_and_empty_texts() -> None:
    found = signatures(["", "a b", "a b c d e f g"], SETTINGS)
    assert found.shape == (3, 256)
    assert signatures([], SETTINGS).shape == (0, 256)
    assert all((a != b).any() for a, b in pairwise(found))
