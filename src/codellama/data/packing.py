"""Packing: documents one after another into contexts of exactly `seq_len` tokens.

A global batch of B sequences is B lanes. Lane b takes documents b, b + B, b + 2B, ... of an endless
shuffled order, packs them, and yields one sequence each step. So the position of the whole loader
is three small numbers a lane, any rank or worker can compute any lane alone, and the global batch
is the same at every world size.

A document that fits whole into what remains of its context may be transformed for infilling; one
that is cut across contexts never is (paper 2.3). Each is wrapped in BOS and EOS (the paper does not
say). Numpy only, like worker.py, which runs it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from codellama.data.fim import split_document, transform
from codellama.tokenizer import Tokenizer


class Documents(Protocol):
    """What packing needs of a corpus."""

    def __len__(self) -> int: ...

    def text(self, index: int) -> str:
        """The text of a document."""
        ...

    def sha256(self, index: int) -> str:
        """A name of the document that does not depend on its place."""
        ...


@dataclass(frozen=True)
class PackingSettings:
    """How documents become sequences."""

    seq_len: int
    fim_rate: float = 0.0
    spm_share: float = 0.5
    max_document_chars: int | None = None
    seed: int = 0
    shuffle: bool = True


class LaneState(NamedTuple):
    """Where a lane stands: the next token to hand out."""

    turn: int = 0
    """How many documents the lane has finished."""
    offset: int = 0
    """How many tokens of the current document are handed out; only a cut one has an offset."""


class PackedSequence(NamedTuple):
    """One row of a batch; every array has `seq_len` items."""

    tokens: np.ndarray  # int64
    targets: np.ndarray  # int64; 0 where loss_mask is False
    loss_mask: np.ndarray  # bool; False where the next token belongs to another document
    document_ids: np.ndarray  # int64, counted from 0 in each sequence
    positions: np.ndarray  # int64, counted from 0 in each document of the sequence


class Lane:
    """An endless stream of packed sequences, resumable from a LaneState."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        settings: PackingSettings,
        lane: int,
        n_lanes: int,
        state: LaneState | None = None,
    ) -> None:
        if len(documents) == 0:
            raise ValueError("the corpus has no documents in this split")
        self.documents = documents
        self.tokenizer = tokenizer
        self.settings = settings
        self.lane = lane
        self.n_lanes = n_lanes
        self.state = state or LaneState()
        self._cut: list[int] = []  # ids of the document that `offset` points into
        if self.state.offset:
            self._cut = self._plain_ids(self._document()[1])

    def next_sequence(self) -> PackedSequence:
        """Pack the next `seq_len` tokens and move the state behind them."""
        n_tokens = self.settings.seq_len
        types = (np.int64, np.int64, np.bool_, np.int64, np.int64)
        row = PackedSequence(*(np.zeros(n_tokens, dtype) for dtype in types))
        filled = document = 0
        while filled < n_tokens:
            n_remaining = n_tokens - filled
            begin = self.state.offset  # one more than fits, for the last target
            ids = self._cut[begin : begin + n_remaining + 1] or self._next_ids(n_remaining)
            taken = min(len(ids), n_remaining)
            following = ids[1 : taken + 1]
            end = filled + taken
            row.tokens[filled:end] = ids[:taken]
            row.targets[filled : filled + len(following)] = following
            row.loss_mask[filled : filled + len(following)] = True
            row.document_ids[filled:end] = document
            row.positions[filled:end] = np.arange(taken)
            self._advance(ids, taken)
            filled = end
            document += 1
        return row

    def _advance(self, ids: list[int], taken: int) -> None:
        """Move the state behind `taken` of the ids that were left of the current document."""
        turn, offset = self.state
        if taken < len(ids):
            self._cut = self._cut or ids
            self.state = LaneState(turn, offset + taken)
        else:
            self._cut = []
            self.state = LaneState(turn + 1)

    def _next_ids(self, n_remaining: int) -> list[int]:
        """The ids of the document that is next, transformed if it fits and is drawn."""
        name, text = self._document()
        ids = self._plain_ids(text)
        settings = self.settings
        if len(ids) <= n_remaining and settings.fim_rate > 0:
            middle_out = transform(
                self.tokenizer, text, random.Random(name), settings.fim_rate, settings.spm_share
            )
            if middle_out is not None and len(middle_out) + 2 <= n_remaining:
                return [self.tokenizer.bos_id, *middle_out, self.tokenizer.eos_id]
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=True, eos=True)

    def _document(self) -> tuple[str, str]:
        """(seed of its random draws, text) of the lane's current document.

        Of a document that is split, an epoch takes one part, the next epoch the next. All parts
        at once would fill a lane with one file for many steps: gradients of neighbouring steps
        would be alike, and validation suffers (docs/experiments.md).
        """
        settings = self.settings
        epoch, place = divmod(self.lane + self.state.turn * self.n_lanes, len(self.documents))
        index = place
        if settings.shuffle:
            index = int(_permutation(settings.seed, epoch, len(self.documents))[place])
        sha256 = self.documents.sha256(index)
        rng = random.Random(f"{settings.seed}/{sha256}")
        parts = split_document(
            self.documents.text(index), part_limit(settings.max_document_chars, rng)
        )
        first = rng.randrange(len(parts))
        return f"{settings.seed}/{epoch}/{sha256}", parts[(first + epoch) % len(parts)]


def part_limit(max_chars: int | None, rng: random.Random) -> int | None:
    """The longest part of one document, between an eighth of the limit and the limit.

    Drawn evenly on a logarithmic scale: of one length for all, few gaps would be short, and the end
    of a gap is learned from gaps that end.
    """
    return max_chars and max(1, round(max_chars * 8 ** -rng.random()))


@lru_cache(maxsize=4)  # the lanes of a worker can be in two epochs at once
def _permutation(seed: int, epoch: int, n_documents: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_documents)


def lanes_of_rank(n_lanes: int, rank: int, world_size: int) -> Sequence[int]:
    """The lanes that one rank computes: a contiguous block.

    Raises:
        ValueError: the lanes do not divide over the ranks.
    """
    if n_lanes % world_size:
        raise ValueError(f"{n_lanes} sequences a batch do not divide over {world_size} ranks")
    share = n_lanes // world_size
    return range(rank * share, (rank + 1) * share)
