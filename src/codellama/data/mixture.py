"""What a stage trains on: named collections of documents with their shares of the tokens.

A collection is some of the corpus, chosen by its columns, or a file of dialogs. Shares are of
tokens, as in the paper's Table 1; the order in which a lane takes documents is in packing.py.

Files in: a corpus folder, JSON lines with one {"messages": [{"role", "content"}, ...]} each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from codellama.data.corpus import CorpusReader, corpus_documents, repositories_of
from codellama.data.packing import Documents, LaneState, Share
from codellama.recipe import Collection
from codellama.tokenizer.chat import check_dialog


class Selected:
    """Some of the documents of a corpus. fits: one bool for each."""

    def __init__(self, reader: CorpusReader, fits: Any) -> None:
        self._reader = reader
        self._indices = np.flatnonzero(fits)

    def __len__(self) -> int:
        return len(self._indices)

    def text(self, index: int) -> str:
        """The text of a document."""
        return self._reader.text(int(self._indices[index]))

    def sha256(self, index: int) -> str:
        """Hexadecimal SHA-256 of a document's text."""
        return self._reader.sha256(int(self._indices[index]))


def chosen(reader: CorpusReader, collection: Collection) -> Selected:
    """The documents of a corpus that a collection names."""
    fits = np.ones(len(reader), dtype=bool)
    for column, values in (
        ("source", collection.sources),
        ("kind", collection.kinds),
        ("language", collection.languages),
    ):
        if values:
            fits &= np.array([value in values for value in reader.column(column)], dtype=bool)
    return Selected(reader, fits)


def by_kinds(reader: CorpusReader) -> dict[str, Selected]:
    """Python, other code, and everything else, as the paper's mixtures tell them apart."""
    is_code = np.array([kind == "code" for kind in reader.column("kind")], dtype=bool)
    are_python = [language == "python" for language in reader.column("language")]
    is_python = is_code & np.array(are_python, dtype=bool)
    fits = {"python": is_python, "other_code": is_code & ~is_python, "text": ~is_code}
    return {name: Selected(reader, mask) for name, mask in fits.items()}


class Dialogs:
    """Dialogs from a file of JSON lines, all checked when it is opened.

    Raises:
        ValueError: the file is missing, or a line (named) is no dialog that ends with an answer.
    """

    def __init__(self, path: Path) -> None:
        self._dialogs: list[str] = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: dialogs cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                messages = json.loads(line)["messages"]
                check_dialog(messages, last="assistant")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected {{"messages": [...]}} that ends with an '
                    f"answer of the assistant: {error}"
                ) from None
            self._dialogs.append(json.dumps(messages))

    def __len__(self) -> int:
        return len(self._dialogs)

    def text(self, index: int) -> str:
        """The messages of a dialog, as JSON."""
        return self._dialogs[index]

    def sha256(self, index: int) -> str:
        """Hexadecimal SHA-256 of a dialog."""
        return hashlib.sha256(self._dialogs[index].encode()).hexdigest()


def open_mixture(
    corpus_dir: Path,
    collections: Mapping[str, Collection],
    weights: Mapping[str, float],
) -> tuple[Share, ...]:
    """Open the collections of a stage.

    weights: the stage's share of each collection, on any scale; empty for the whole corpus.

    Raises:
        ValueError: a collection is unknown, empty or damaged, or the repositories are those of
            another corpus; names it.
    """
    if not weights:
        return (Share("corpus", corpus_documents(corpus_dir, "train")),)
    shares: list[Share] = []
    opened = cache(corpus_documents)
    for name, weight in weights.items():
        if name not in collections:
            raise ValueError(
                f"no collection {name!r}; the recipe has {', '.join(sorted(collections))}"
            )
        collection = collections[name]
        documents: Documents
        if collection.dialogs is not None:
            documents = Dialogs(collection.dialogs)
        else:
            reader = opened(corpus_dir, "train")
            if collection.repositories:
                made_from, reader = reader.fingerprint, opened(repositories_of(corpus_dir), "train")
                if reader.manifest.get("made_from") != made_from:
                    raise ValueError(f"{reader.folder}: of another corpus; prepare the recipe")
            documents = chosen(reader, collection)
        shares.append(Share(f"collection {name!r}", documents, weight, bool(collection.dialogs)))
    return tuple(shares)


def fingerprint(mixture: Sequence[Share]) -> str:
    """Changes whenever a dialog of the mixture, or their order, changes."""
    digest = hashlib.sha256()
    for share in mixture:
        if share.are_dialogs:
            for index in range(len(share.documents)):
                digest.update(share.documents.sha256(index).encode())
    return digest.hexdigest()[:16]


def mixture_report(mixture: Sequence[Share], states: Sequence[LaneState]) -> list[dict[str, Any]]:
    """Of each collection: documents, tokens, share of the tokens and epochs seen so far."""
    finished = [state for state in states if state.turns]
    total = sum(sum(state.tokens) for state in finished)
    rows: list[dict[str, Any]] = []
    for i, share in enumerate(mixture):
        n_documents = sum(state.turns[i] for state in finished)
        n_tokens = sum(state.tokens[i] for state in finished)
        rows.append(
            {
                "collection": share.name,
                "documents": n_documents,
                "tokens": n_tokens,
                "share": round(n_tokens / total, 4) if total else 0.0,
                "epochs": round(n_documents / len(share.documents), 4),
            }
        )
    return rows
