"""The choice: which examined documents are trained on, which are held out, which are duplicates.

Whole packages are held out, for files of one package resemble each other. No text is seen.

In: the columns of the examined files, in the order of the sources and then by repository and path.
Out: for each row `train`, `validation` or None, and the row that stands for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from codellama.data.dedup import KEY_BYTES, first_copies
from codellama.data.near_dedup import representatives
from codellama.data.wheels import normalised_name
from codellama.recipe import Corpus

DROPPED, TRAIN, VALIDATION = -1, 0, 1


@dataclass
class Rows:
    """What the choice looks at; every array has one item a row."""

    source: np.ndarray
    """Place of the source in the recipe."""
    repository: np.ndarray  # object: str
    reason: np.ndarray  # object: str or None; reasons of duplicates are filled in
    key: np.ndarray  # V16
    sha256: np.ndarray  # object: str
    n_bytes: np.ndarray  # int64
    place: np.ndarray
    """Where each row's signature stands."""


@dataclass
class Fixed:
    """Documents of other corpora, which none of this one may repeat; signatures come first."""

    key: np.ndarray  # V16
    n_bytes: np.ndarray


NONE_FIXED = Fixed(np.zeros(0, f"V{KEY_BYTES}"), np.zeros(0, np.int64))


def assign_splits(
    corpus: Corpus, rows: Rows, signatures: np.ndarray | None = None, fixed: Fixed = NONE_FIXED
) -> tuple[np.ndarray, np.ndarray]:
    """Decide the split of each row, mark duplicates, and name the row that stands for each.

    Of duplicates one stays: that of a held-out package first, so that nothing like what is
    validated on is trained on; then that of the earlier source; then of near duplicates the
    longest; then the first by name. Without held-out packages, documents are held out by hash.

    Returns: splits [n] of DROPPED, TRAIN or VALIDATION; representatives [n], -1 for those of other
    corpora.
    """
    names, inverse = np.unique(rows.repository, return_inverse=True)
    held = np.array([_is_held_out(corpus, str(name)) for name in names], bool)[inverse]
    n_rows = len(rows.reason)
    stands_for = np.arange(n_rows)
    candidates = np.flatnonzero([reason is None for reason in rows.reason])
    order = candidates[np.lexsort((candidates, rows.source[candidates], ~held[candidates]))]
    n_fixed = len(fixed.key)

    def drop(order: np.ndarray, first: np.ndarray, reason: str) -> np.ndarray:
        """Leave those that stand for themselves; first: places in order, below 0 of `fixed`."""
        stands_for[order] = np.where(first >= 0, order[np.maximum(first, 0)], -1)
        twice = first != np.arange(len(order))
        rows.reason[order[twice]] = reason
        return order[~twice]

    keys = np.concatenate([fixed.key, rows.key[order]])
    order = drop(order, first_copies(keys)[n_fixed:] - n_fixed, "duplicate")
    if signatures is not None and corpus.near_duplicates and len(order):
        group = np.where(held[order], 0, 1 + len(corpus.sources)) + rows.source[order]
        chosen = representatives(
            signatures,
            np.r_[np.full(n_fixed, -1), group],
            np.r_[fixed.n_bytes, rows.n_bytes[order]],
            corpus.near_duplicates,
            n_fixed,
            np.r_[np.arange(n_fixed), rows.place[order]],
        )
        order = drop(order, chosen[n_fixed:] - n_fixed, "near duplicate")
    # What stands for a duplicate may itself have been near another.
    stands_for = np.where(stands_for >= 0, stands_for[np.maximum(stands_for, 0)], -1)
    split = np.full(n_rows, DROPPED, np.int8)
    split[order] = np.where(held[order], VALIDATION, TRAIN)
    _hold_out_documents(corpus, rows, split, np.sort(order))
    return split, stands_for


def _hold_out_documents(corpus: Corpus, rows: Rows, split: np.ndarray, kept: np.ndarray) -> None:
    """Hold out single documents where one of the splits would be empty: too few packages."""
    named = {normalised_name(name) for name in corpus.hold_out}
    free = [int(i) for i in kept if normalised_name(str(rows.repository[i])) not in named]
    if free and len(np.unique(split[kept])) == 1:
        free.sort(key=lambda index: unit_hash(corpus.seed, rows.sha256[index]))
        n_held = min(max(1, round(corpus.validation_share * len(free))), len(free) - 1)
        split[free] = [VALIDATION if rank < n_held else TRAIN for rank in range(len(free))]


def _is_held_out(corpus: Corpus, repository: str) -> bool:
    """Whether a package is held out whole; the standard library never is by its hash."""
    name = normalised_name(repository)
    if name in {normalised_name(held) for held in corpus.hold_out}:
        return True
    return name != "cpython" and unit_hash(corpus.seed, name) < corpus.validation_share


def unit_hash(seed: int, text: str) -> float:
    """A number in [0, 1) that depends on both arguments and nothing else."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)
