"""Speculation: guess the next tokens cheaply, and let the model check several in one pass.

Guesses come from the text itself (code repeats what stands above it, and an edited file repeats the
one in the prompt) or from a small model of the same vocabulary. Checking is the runner's: it keeps
what the model would have chosen itself, so guesses change the speed and never the result, nor the
distribution where tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import accumulate

import torch

from codellama.engine.cache import Span
from codellama.engine.runner import Chosen, Runner
from codellama.engine.scheduler import STEP_TOKENS
from codellama.engine.sequence import Sequence
from codellama.model.transformer import Transformer

NGRAM = 3  # tokens that must have stood together before for what followed them to be a guess
MAX_SEQUENCES = 4  # with more at a time the pass is busy enough without guesses
MAX_LOSS = 0.02  # of the time spent decoding
_SMOOTHING = 0.1
_MEMORY = 0.99  # of the account, a step: about the last hundred steps count


class Guesser:
    """Looks for guesses in one sequence and learns how many are worth making."""

    def __init__(self, max_guesses: int) -> None:
        self.n_wanted = min(4, max_guesses)
        self._max_guesses = max_guesses
        self._n_paused = 0
        self._n_misses = 0
        self._followers: dict[tuple[int, ...], int] = {}
        self._n_indexed = 0
        self.cached_blocks: list[int] = []
        self.n_cached = 0

    def is_pausing(self) -> bool:
        """Whether recent misses advise against guessing now; counts the steps."""
        self._n_paused = max(0, self._n_paused - 1)
        return self._n_paused > 0

    def look_up(self, tokens: list[int]) -> list[int]:
        """What followed the last few tokens where they stood before, most recently."""
        for end in range(max(self._n_indexed, NGRAM), len(tokens)):
            self._followers[tuple(tokens[end - NGRAM : end])] = end
        self._n_indexed = len(tokens)
        at = self._followers.get(tuple(tokens[-NGRAM:]))
        if at is None:
            return []
        guesses: list[int] = []
        for place in range(at, at + self.n_wanted):  # runs on into the guesses where text repeats
            known = place < len(tokens)
            guesses.append(tokens[place] if known else guesses[place - len(tokens)])
        return guesses

    def learn(self, n_guessed: int, n_right: int) -> None:
        """Guess more after hits, fewer after misses, and rest ever longer after many misses."""
        if n_right == n_guessed:
            self.n_wanted = min(2 * self.n_wanted, self._max_guesses)
        else:
            self.n_wanted = n_right + 1
        self._n_misses = 0 if n_right else self._n_misses + 1
        if self._n_misses:
            self._n_paused = 1 << min(self._n_misses, 6)


class Speculator:
    """Makes guesses for running sequences, as long as they save time.

    It keeps an account of the time that guesses saved and cost beside plain steps of as many
    sequences, and rests while the account stands too low.
    """

    def __init__(self, max_guesses: int, draft: DraftModel | None = None) -> None:
        self._max_guesses, self._draft = max_guesses, draft
        self._plain_s: dict[int, float] = {}  # seconds of a plain step, for a number of sequences
        self._saved_s = 0.0
        self._total_s = 0.0
        self.n_guessed = 0
        self.n_right = 0

    def prepare(self, running: Items[Sequence]) -> None:
        """Set the drafts of sequences that decode."""
        if not self._max_guesses or not 0 < len(running) <= MAX_SEQUENCES:
            return
        if any(sequence.n_pending != 1 for sequence in running):
            return
        if len(running) not in self._plain_s or self._saved_s < -MAX_LOSS * self._total_s:
            return
        for sequence in running:
            if sequence.changes_logits:  # in a way that depends on the guesses before
                continue
            if sequence.guesser is None:
                sequence.guesser = Guesser(self._max_guesses)
            guesser = sequence.guesser
            if self._draft is None and not guesser.is_pausing():
                sequence.draft = guesser.look_up(sequence.tokens)[: sequence.n_left - 1]
        if self._draft is not None:
            guessing = [s for s in running if s.guesser and not s.guesser.is_pausing()]
            self._draft.guess(guessing)

    def note(
        self,
        plan: Items[tuple[Sequence, int]],
        drafts: Items[int],
        results: Items[Chosen],
        s: float,
    ) -> None:
        """Learn from a step that took s seconds: how many guesses each had, and what came."""
        if any(n_tokens != 1 for _, n_tokens in plan):
            return
        n_sequences = len(plan)
        self._total_s = _MEMORY * self._total_s + s
        self._saved_s *= _MEMORY
        if not any(drafts):
            before = self._plain_s.get(n_sequences, s)
            self._plain_s[n_sequences] = before + _SMOOTHING * (s - before)
            return
        for (sequence, _), n_guessed, chosen in zip(plan, drafts, results, strict=True):
            if n_guessed and sequence.guesser is not None:
                sequence.guesser.learn(n_guessed, len(chosen) - 1)
                self.n_guessed += n_guessed
                self.n_right += len(chosen) - 1
        n_tokens = sum(map(len, results))
        if (plain_s := self._plain_s.get(n_sequences)) is not None:
            self._saved_s += n_tokens / n_sequences * plain_s - s
            # What went well earlier must not pay for a long time of misses.
            self._saved_s = min(self._saved_s, MAX_LOSS * self._total_s)


class DraftModel:
    """A small model that guesses; its keys and values use the same blocks as the large one's.

    Blocks that a sequence took over from another may lack its values; guesses are then poor.

    Raises:
        ValueError: its vocabulary is not the large model's.
    """

    def __init__(self, model: Transformer, of: Transformer, n_blocks: int, block_tokens: int):
        sizes = model.config.vocab_size, of.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(f"the draft model has {sizes[0]} tokens, the model {sizes[1]}")
        self._block_tokens = block_tokens
        self._runner = Runner(model, n_blocks, block_tokens)

    @torch.inference_mode()
    def guess(self, sequences: Items[Sequence]) -> None:
        """Set the drafts of sequences, as far as their blocks reach."""
        wanted: dict[Sequence, int] = {}
        inputs: dict[Sequence, list[int]] = {}
        for sequence in sequences:
            guesser = sequence.guesser
            assert guesser is not None
            if guesser.cached_blocks is not sequence.blocks:
                guesser.cached_blocks, guesser.n_cached = sequence.blocks, sequence.n_reused
            guesser.n_cached = min(guesser.n_cached, len(sequence.tokens) - 1)
            room = len(sequence.blocks) * self._block_tokens - len(sequence.tokens) + 1
            n_guesses = min(guesser.n_wanted, room, sequence.n_left - 1)
            if n_guesses > 0:
                wanted[sequence] = n_guesses
                inputs[sequence] = sequence.tokens[guesser.n_cached :][:STEP_TOKENS]
        while inputs:
            following = self._next(inputs)
            inputs = {}
            for sequence, token in following.items():
                sequence.draft.append(token)
                if len(sequence.draft) < wanted[sequence]:
                    inputs[sequence] = [token]

    def _next(self, inputs: dict[Sequence, list[int]]) -> dict[Sequence, int]:
        """The next token of each sequence whose input reached the end of what is known."""
        spans: list[Span] = []
        for sequence, tokens in inputs.items():
            assert sequence.guesser is not None
            begin = sequence.guesser.n_cached
            sequence.guesser.n_cached += len(tokens)
            spans.append(Span(sequence.blocks, begin, begin + len(tokens)))
        ends = [end - 1 for end in accumulate(map(len, inputs.values()))]
        logits = self._runner.logits([t for part in inputs.values() for t in part], spans, ends)
        chosen = logits.argmax(-1).tolist()
        return {
            sequence: token
            for (sequence, span), token in zip(zip(inputs, spans, strict=True), chosen, strict=True)
            if span.end >= len(sequence.tokens)
        }
