"""The runner: the only place where sequences meet tensors. One forward pass, one token each."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from codellama.engine.cache import KeyValueCache
from codellama.engine.sequence import Sequence
from codellama.model.attention import causal
from codellama.model.transformer import Transformer


class Runner:
    """Holds the model and its cache; row r of the cache is `sequences[r]`."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        weight = model.model.embed_tokens.weight  # lm_head may hold integers
        self._device = weight.device
        self.cache = KeyValueCache(model.config, str(weight.device), weight.dtype)
        self.sequences: list[Sequence] = []

    @torch.inference_mode()
    def prefill(self, sequences: Items[Sequence]) -> list[tuple[int, float]]:
        """Add sequences, run their prompts in one pass, and return each one's first token."""
        rows = []
        for sequence in sequences:
            rows.append(len(self.sequences))
            self.cache.add_row()
            self.sequences.append(sequence)
        counts = [len(sequence.prompt) for sequence in sequences]
        tokens = torch.tensor([t for s in sequences for t in s.prompt], device=self._device)
        positions = torch.cat([torch.arange(count, device=self._device) for count in counts])
        hidden = self.model.model(tokens, positions, self.cache.prefill(rows, counts))
        ends = torch.tensor(counts, device=self._device).cumsum(0) - 1
        return self._choose(hidden[ends], sequences)

    @torch.inference_mode()
    def decode(self) -> list[tuple[int, float]]:
        """Run one more token of every sequence and return the next ones, in row order."""
        tokens = torch.tensor([s.token_ids[-1] for s in self.sequences], device=self._device)
        positions = torch.tensor(self.cache.lengths, device=self._device)
        hidden = self.model.model(tokens, positions, self.cache.decode())
        return self._choose(hidden, self.sequences)

    def remove(self, row: int) -> None:
        """Take a finished sequence out; the last one takes its row."""
        self.cache.remove_row(row)
        self.sequences[row] = self.sequences[-1]
        self.sequences.pop()

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> list[float]:
        """Log-probability of each token after the first, given those before it."""
        ids = torch.tensor(tokens, device=self._device)
        hidden = self.model.model(
            ids[None, :-1], torch.arange(len(ids) - 1, device=self._device)[None], causal
        )
        scores: list[float] = []
        for begin in range(0, len(ids) - 1, 1024):  # never the logits of a whole long text
            part = slice(begin, begin + 1024)
            logits = self.model.lm_head(hidden[0, part]).float()
            chosen = logits.log_softmax(-1).gather(-1, ids[1:][part, None])
            scores += chosen[:, 0].tolist()
        return scores

    def _choose(self, hidden: Tensor, sequences: Items[Sequence]) -> list[tuple[int, float]]:
        """Project hidden states [N, D] and pick each sequence's next token.

        Raises:
            ValueError: the model produced values that are not numbers.
        """
        logits = self.model.lm_head(hidden).float()
        tokens = logits.argmax(-1)
        sampled = [row for row, s in enumerate(sequences) if s.params.temperature > 0]
        if sampled:
            tokens[sampled] = sample(logits[sampled], [sequences[row] for row in sampled])
        best = logits.gather(-1, tokens[:, None])[:, 0]
        logprobs = (best - logits.logsumexp(-1)).tolist()
        if any(value != value for value in logprobs):
            raise ValueError("the model's output is not a number; its weights are damaged")
        return list(zip(tokens.tolist(), logprobs, strict=True))


def sample(logits: Tensor, sequences: Items[Sequence]) -> Tensor:
    """Draw one token a row with each sequence's own settings and random numbers.

    Nucleus as in the reference: a token is dropped if the probability before it exceeds top_p, so
    the most likely one always stays. Source: the released generation code.

    Args:
        logits: [N, V] float32.

    Returns:
        [N] int64.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    temperatures = column([s.params.temperature for s in sequences])
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures
    probabilities, order = scaled.softmax(-1).sort(stable=True, dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    keep = before <= column([s.params.top_p for s in sequences])
    vocabulary = logits.shape[-1]
    top_k = column([float(s.params.top_k or vocabulary) for s in sequences])
    keep &= torch.arange(vocabulary, device=logits.device)[None] < top_k
    kept = probabilities * keep
    cumulative = kept.cumsum(-1)
    draws = column([s.draw() for s in sequences]) * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the draw; rounding may leave none.
    places = (cumulative <= draws).sum(-1, keepdim=True).clamp(max=keep.sum(-1, keepdim=True) - 1)
    return order.gather(-1, places)[:, 0]
