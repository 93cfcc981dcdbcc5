"""Near duplicates: documents whose sets of word n-grams resemble each other.

    text -> MinHash signature -> bands -> candidate pairs -> estimated Jaccard -> components

Two documents are candidates where all hashes of one band are equal; a pair counts where the
share of equal hashes, which estimates the Jaccard similarity, reaches the threshold less twice the
estimate's standard deviation. What such pairs connect is a cluster.

In: texts, then signatures [n, n_hashes] uint32, on disk or in memory. Out: for each document the
one that stands for it. Memory: 50 bytes a document, and the signatures of the pairs at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import daft
import numpy as np

from codellama.recipe import NearDuplicates

PAIRS_AT_ONCE = 16_384  # of 2 x 1 kB

# Letters, digits, underscore and whatever is not ASCII are parts of words; the rest are blanks.
_BLANKS = bytes(i if i >= 128 or i == 95 or chr(i).isalnum() else 32 for i in range(256))


def signatures(texts: list[str], settings: NearDuplicates) -> np.ndarray:
    """MinHash signatures [n, n_hashes] uint32 of texts, by Daft's kernel.

    It cuts at single blanks, so white space and punctuation are made one blank first.
    """
    words = [
        b" ".join(text.encode("utf-8", "replace").translate(_BLANKS).split()).decode()
        for text in texts
    ]
    if not texts:
        return np.zeros((0, settings.n_hashes), np.uint32)
    series = daft.Series.from_pylist(words, dtype=daft.DataType.string())
    hashed = series.minhash(
        num_hashes=settings.n_hashes,
        ngram_size=settings.ngram,
        seed=1,
        hash_function="xxhash64",  # as good as the others here, and the fastest
    )
    flat = cast(Any, hashed.to_arrow()).flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(texts), settings.n_hashes)


def representatives(
    signatures: np.ndarray,
    group: np.ndarray,
    n_bytes: np.ndarray,
    settings: NearDuplicates,
    n_fixed: int = 0,
    place: np.ndarray | None = None,
) -> np.ndarray:
    """The row that stands for each row: itself where the document stays.

    signatures: [n, n_hashes] uint32, may be a memory map. group: [n], ascending. n_bytes: [n]. Of a
    cluster within a group the longest document stays, of equally long ones the first; none
    where one of the cluster resembles a document that stays of an earlier group. The first
    `n_fixed` rows stay whatever they resemble: an existing corpus. place: [n] row of each in
    `signatures`, if not the same.
    """
    place = np.arange(len(group)) if place is None else place
    kept = np.arange(n_fixed)
    chosen = np.arange(len(group))
    begin = n_fixed
    while begin < len(group):
        end = int(np.searchsorted(group, group[begin], side="right"))
        rows = np.arange(begin, end)
        label, twin = _components(signatures, place, kept, rows, settings)
        # The first of each label in the order of (label, longest, first).
        order = np.lexsort((rows, -n_bytes[rows], label))
        first = np.r_[True, label[order][1:] != label[order][:-1]]
        best = order[first][np.cumsum(first) - 1]
        chosen[rows[order]] = np.where(twin[order] >= 0, twin[order], rows[best])
        kept = np.r_[kept, rows[chosen[rows] == rows]]
        begin = end
    return chosen


def _components(
    signatures: np.ndarray,
    place: np.ndarray,
    kept: np.ndarray,
    rows: np.ndarray,
    settings: NearDuplicates,
) -> tuple[np.ndarray, np.ndarray]:
    """For each row: a label that its cluster shares, and a kept row that the cluster resembles.

    The latter is -1 where there is none.
    """
    everything = np.r_[kept, rows]
    n_kept = len(kept)
    threshold = settings.threshold
    least = threshold - 2 * (threshold * (1 - threshold) / settings.n_hashes) ** 0.5
    # Of each place in `everything` its parent; a kept row never gets one, and a root that is a
    # kept row makes the whole tree its own.
    parent = np.arange(len(everything))
    for keys in _bands(signatures, place[everything], settings):
        order = np.argsort(keys, kind="stable")
        for left, right in _candidates(keys[order], order, parent, n_kept):
            for at in range(0, len(left), PAIRS_AT_ONCE):
                a, b = left[at : at + PAIRS_AT_ONCE], right[at : at + PAIRS_AT_ONCE]
                equal = signatures[place[everything[a]]] == signatures[place[everything[b]]]
                for pair in np.flatnonzero(equal.mean(axis=1) >= least):
                    _connect(parent, int(a[pair]), int(b[pair]), n_kept)
            _flatten(parent)
    label = parent[n_kept:]
    return label, np.where(label < n_kept, everything[label], -1)


def _bands(
    signatures: np.ndarray, rows: np.ndarray, settings: NearDuplicates
) -> Iterator[np.ndarray]:
    """For each band a 64-bit key of every row's hashes in it."""
    width = settings.n_hashes // settings.n_bands
    factors = np.random.default_rng(0).integers(1, 1 << 63, width, dtype=np.uint64) | np.uint64(1)
    for band in range(settings.n_bands):
        part = signatures[:, band * width : (band + 1) * width]
        keys = np.zeros(len(rows), np.uint64)
        for column in range(width):
            keys += part[rows, column].astype(np.uint64) * factors[column]
            keys ^= keys >> np.uint64(29)
        yield keys


def _candidates(
    keys: np.ndarray, order: np.ndarray, parent: np.ndarray, n_kept: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places with equal keys that are not connected yet, by their distance in the run.

    keys: sorted, of the places `order`; kept places come first in each run. A run whose documents
    are all connected ends early: thousands of copies are not compared each with each.
    """
    begins = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    lengths = np.diff(np.r_[begins, len(keys)])
    begins, lengths = begins[lengths > 1], lengths[lengths > 1]
    distance = 1
    while len(begins):
        # Every place of every run that has another one `distance` behind it.
        places = _places(begins, lengths - distance)
        left, right = order[places], order[places + distance]
        apart = (parent[left] != parent[right]) & (right >= n_kept)
        # A document that has gone to a kept one cannot go to another.
        apart &= ~((parent[left] < n_kept) & (parent[right] < n_kept))
        if apart.any():
            yield left[apart], right[apart]
        distance += 1
        roots = parent[order][_places(begins, lengths)]
        at = np.r_[0, np.cumsum(lengths)[:-1]]
        first, last = np.minimum.reduceat(roots, at), np.maximum.reduceat(roots, at)
        more = (lengths > distance) & (first != last)
        begins, lengths = begins[more], lengths[more]


def _places(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Every place of runs, one run after another."""
    starts = np.repeat(begins - np.r_[0, np.cumsum(lengths)[:-1]], lengths)
    return starts + np.arange(lengths.sum())


def _connect(parent: np.ndarray, a: int, b: int, n_kept: int) -> None:
    """Make one tree of two, its root the smaller place; two kept rows stay apart."""
    while parent[a] != a:
        a = parent[a]
    while parent[b] != b:
        b = parent[b]
    a, b = min(a, b), max(a, b)
    if b >= n_kept:
        parent[b] = a


def _flatten(parent: np.ndarray) -> None:
    """Let every place point at its root."""
    while not np.array_equal(above := parent[parent], parent):
        parent[:] = above
