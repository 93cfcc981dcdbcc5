"""Exact duplicates: of all documents with the same normalised text, one stays.

Near duplicates are not looked for here. Which copy stays is fixed by an order given from outside,
so the result does not depend on how the rows are spread over machines.

In: a dataframe with `key` and `order`. Out: the same rows with a boolean `is_duplicate`.
"""

from __future__ import annotations

import hashlib

import daft
from daft import col


def normalised_key(text: str) -> str:
    """Hexadecimal SHA-256 of a text without blank lines, trailing blanks and kinds of line ends."""
    lines = (line.rstrip() for line in text.splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()


def mark_duplicates(documents: daft.DataFrame) -> daft.DataFrame:
    """Mark every document whose `key` also belongs to one with a smaller `order`.

    documents: columns `key` (str) and `order` (int, unique), and any others, which are kept.
    """
    first = documents.groupby("key").agg(col("order").min().alias("first"))
    marked = documents.join(first, on="key")
    return marked.with_column("is_duplicate", col("order") != col("first")).exclude("first")
