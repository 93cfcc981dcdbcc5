"""The split: which documents are trained on, which are held out, and which are duplicates.

Whole packages are held out, for files of one package resemble each other. It decides on names and
hashes alone and never sees a text.

In: columns of the examined files. Out: `train`, `validation` or None for each.
"""

from __future__ import annotations

import hashlib
from typing import Any

import daft
from daft import col

from codellama.data.dedup import mark_duplicates
from codellama.data.sources import normalised_name
from codellama.recipe import Corpus


def assign_splits(corpus: Corpus, rows: dict[str, list[Any]]) -> list[str | None]:
    """Decide `train`, `validation` or None (dropped) for each row, and mark duplicates as such.

    Whole packages are held out. Of documents with equal normalised text one stays: the one of a
    held-out package first, so that what is validated on is never trained on, then the one of the
    earlier source. Without any held-out document, single documents are held out by their hash.
    rows: columns `repository`, `reason`, `key`, `sha256`; reasons of duplicates are filled in.
    """
    held = {name: _is_held_out(corpus, name) for name in set(rows["repository"])}
    n_rows = len(rows["reason"])
    ids = [index for index in range(n_rows) if rows["reason"][index] is None]
    if not ids:
        return [None] * n_rows
    order = [index + (0 if held[rows["repository"][index]] else n_rows) for index in ids]
    frame = daft.from_pydict({"id": ids, "order": order, "key": [rows["key"][i] for i in ids]})
    marked = mark_duplicates(frame).where(col("is_duplicate")).select("id").to_pydict()
    split: list[str | None] = [None] * n_rows
    for index in ids:
        split[index] = "validation" if held[rows["repository"][index]] else "train"
    for index in marked["id"]:
        split[index], rows["reason"][index] = None, "duplicate"
    named = {normalised_name(name) for name in corpus.hold_out}
    kept = [index for index in ids if split[index]]
    free = [i for i in kept if normalised_name(rows["repository"][i]) not in named]
    if free and len({split[index] for index in kept}) == 1:
        # Too few packages: one split would be empty, so single documents are held out instead.
        free.sort(key=lambda index: unit_hash(corpus.seed, rows["sha256"][index]))
        n_held = min(max(1, round(corpus.validation_share * len(free))), len(free) - 1)
        for rank, index in enumerate(free):
            split[index] = "validation" if rank < n_held else "train"
    return split


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
