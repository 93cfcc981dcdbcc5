"""Packing: documents one after another into contexts of exactly `seq_len` tokens.

A global batch of B sequences is B lanes. Lane b takes documents b, b + B, b + 2B, ... of an endless
shuffled order, packs them, and yields one sequence each step. So the position of the whole loader
is a few small numbers a lane, any rank or worker can compute any lane alone, and the global batch
is the same at every world size.

Of several collections (mixture.py) each has its own order, and a lane takes its next document from
the one that is furthest behind its share of the lane's tokens.

A document that fits whole into what remains of its context may be transformed for infilling; one
that is cut across contexts never is (paper 2.3). Each is wrapped in BOS and EOS (the paper does not
say). A dialog comes with the ids to learn from. Numpy only, like worker.py, which runs it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from codellama.data.fim import split_document, transform
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.chat import dialog_example


class Documents(Protocol):
    """What packing needs of a collection of documents."""

    def __len__(self) -> int: ...

    def text(self, index: int) -> str:
        """The text of a document; of a dialog, its messages as JSON."""
        ...

    def sha256(self, index: int) -> str:
        """A name of the document that does not depend on its place."""
        ...


class Share(NamedTuple):
    """One collection of a mixture."""

    name: str
    documents: Documents
    weight: float = 1.0
    are_dialogs: bool = False


@dataclass(frozen=True)
class PackingSettings:
    """How documents become sequences."""

    seq_len: int
    fim_rate: float = 0.0
    spm_share: float = 0.5
    fim_line_share: float = 0.0
    fim_middle_weight: float = 1.0
    prompt_weight: float = 0.0
    max_document_chars: int | None = None
    repeat_rate: float = 0.0
    seed: int = 0
    shuffle: bool = True


class LaneState(NamedTuple):
    """Where a lane stands: the next token to hand out."""

    turns: tuple[int, ...] = ()
    """How many documents of each collection the lane has finished."""
    tokens: tuple[int, ...] = ()
    """How many tokens they had."""
    offset: int = 0
    """How many tokens of the current document are handed out; only a cut one has an offset."""


class Encoded(NamedTuple):
    """The ids of a document, BOS and EOS included."""

    name: str
    ids: list[int]
    weights: list[float] | None = None
    """How much of the loss each id is; None for 1."""


class PackedSequence(NamedTuple):
    """One row of a batch; every array has `seq_len` items."""

    tokens: np.ndarray  # int64
    targets: np.ndarray  # int64; 0 at the end of a document
    loss_mask: np.ndarray  # bool; False at the end of a document, and what is not learned
    document_ids: np.ndarray  # int64, counted from 0 in each sequence
    positions: np.ndarray  # int64, counted from 0 in each document of the sequence
    loss_weights: np.ndarray  # float32; 0 where loss_mask is False


class Lane:
    """An endless stream of packed sequences, resumable from a LaneState.

    Raises:
        ValueError: a collection has no documents; names it.
    """

    def __init__(
        self,
        mixture: Sequence[Share],
        tokenizer: Tokenizer,
        settings: PackingSettings,
        lane: int,
        n_lanes: int,
        state: LaneState | None = None,
    ) -> None:
        for share in mixture:
            if len(share.documents) == 0:
                raise ValueError(f"{share.name} has no documents in this split")
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.settings = settings
        self.lane = lane
        self.n_lanes = n_lanes
        zeros = (0,) * len(mixture)
        self.state = state if state and state.turns else LaneState(zeros, zeros)
        self.names: list[str] = []
        """The documents of the last sequence, each as seed/epoch/sha256."""
        self._cut: Encoded | None = None  # the document that `offset` points into
        if self.state.offset:
            self._cut = self._whole()

    def next_sequence(self) -> PackedSequence:
        """Pack the next `seq_len` tokens and move the state behind them."""
        n_tokens = self.settings.seq_len
        types = (np.int64, np.int64, np.bool_, np.int64, np.int64, np.float32)
        row = PackedSequence(*(np.zeros(n_tokens, dtype) for dtype in types))
        self.names = []
        filled = document = 0
        while filled < n_tokens:
            n_remaining = n_tokens - filled
            current = self._cut or self._next(n_remaining)
            self.names.append(current.name)
            begin = self.state.offset  # one more than fits, for the last target
            ids = current.ids[begin : begin + n_remaining + 1]
            taken = min(len(ids), n_remaining)
            following = ids[1 : taken + 1]
            end, last = filled + taken, filled + len(following)
            row.tokens[filled:end] = ids[:taken]
            row.targets[filled:last] = following
            row.loss_weights[filled:last] = 1
            if current.weights is not None:
                weights = current.weights[begin + 1 : begin + 1 + len(following)]
                row.loss_weights[filled:last] = weights
            row.document_ids[filled:end] = document
            row.positions[filled:end] = np.arange(taken)
            self._advance(current, taken)
            filled = end
            document += 1
        np.greater(row.loss_weights, 0, out=row.loss_mask)
        return row

    def _advance(self, current: Encoded, taken: int) -> None:
        """Move the state behind `taken` more ids of the current document."""
        turns, tokens, offset = self.state
        if offset + taken < len(current.ids):
            self._cut = current
            self.state = LaneState(turns, tokens, offset + taken)
            return
        chosen = self._chosen()
        self._cut = None
        self.state = LaneState(
            tuple(n + (i == chosen) for i, n in enumerate(turns)),
            tuple(n + len(current.ids) * (i == chosen) for i, n in enumerate(tokens)),
        )

    def _chosen(self) -> int:
        """The collection that is furthest behind its share of the finished tokens."""
        total = sum(share.weight for share in self.mixture)
        done = sum(self.state.tokens) + 1
        behind = [
            share.weight / total * done - n
            for share, n in zip(self.mixture, self.state.tokens, strict=True)
        ]
        return behind.index(max(behind))

    def _next(self, n_remaining: int) -> Encoded:
        """The document that is next, transformed if it fits and is drawn."""
        whole = self._whole()
        settings = self.settings
        if whole.weights is not None:
            return whole
        drawn = random.Random(f"{whole.name}/repeat").random() < settings.repeat_rate
        if drawn and 2 * len(whole.ids) <= n_remaining:
            return Encoded(whole.name, [*whole.ids[:-1], *whole.ids[1:]])
        if len(whole.ids) <= n_remaining and settings.fim_rate > 0:
            name, text = self._document()
            transformed = transform(
                self.tokenizer,
                text,
                random.Random(name),
                settings.fim_rate,
                settings.spm_share,
                settings.fim_line_share,
                settings.fim_middle_weight,
            )
            if transformed is not None and len(transformed[0]) + 2 <= n_remaining:
                ids, weights = transformed
                ids = [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]
                return Encoded(name, ids, weights and [1.0, *weights, 1.0])
        return whole

    def _whole(self) -> Encoded:
        """The current document as it is."""
        name, text = self._document()
        if self.mixture[self._chosen()].are_dialogs:
            ids, is_answer = dialog_example(self.tokenizer, json.loads(text))
            prompt_weight = self.settings.prompt_weight
            return Encoded(name, ids, [1.0 if learned else prompt_weight for learned in is_answer])
        return Encoded(name, self.tokenizer.encode(text, bos=True, eos=True))

    def _document(self) -> tuple[str, str]:
        """(seed of its random draws, text) of the lane's current document.

        Of a document that is split, an epoch takes one part, the next epoch the next. All parts
        at once would fill a lane with one file for many steps: gradients of neighbouring steps
        would be alike, and validation suffers (docs/experiments.md).
        """
        settings, chosen = self.settings, self._chosen()
        documents = self.mixture[chosen].documents
        turn = self.state.turns[chosen]
        epoch, index = divmod(self.lane + turn * self.n_lanes, len(documents))
        if settings.shuffle:
            index = int(_permutation(settings.seed, epoch, len(documents))[index])
        sha256, text = documents.sha256(index), documents.text(index)
        if self.mixture[chosen].are_dialogs:
            return f"{settings.seed}/{epoch}/{sha256}", text
        rng = random.Random(f"{settings.seed}/{sha256}")
        parts = split_document(text, part_limit(settings.max_document_chars, rng))
        first = rng.randrange(len(parts))
        return f"{settings.seed}/{epoch}/{sha256}", parts[(first + epoch) % len(parts)]


def part_limit(max_chars: int | None, rng: random.Random) -> int | None:
    """The longest part of one document, between an eighth of the limit and the limit.

    Drawn evenly on a logarithmic scale: of one length for all, few gaps would be short, and the end
    of a gap is learned from gaps that end.
    """
    return max_chars and max(1, round(max_chars * 8 ** -rng.random()))


@lru_cache(maxsize=16)  # the lanes of a worker can be in two epochs of each collection
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
