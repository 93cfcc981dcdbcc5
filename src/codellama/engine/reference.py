"""The slow, obvious generator: the whole text through the model again for every token.

No cache, no batch, no shortcuts; every engine test is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from codellama.engine.grammar import matcher_of
from codellama.engine.sampling import SamplingParams
from codellama.model.transformer import Transformer
from codellama.tokenizer import Tokenizer


@torch.inference_mode()
def generate_greedy(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    stop_ids: Collection[int] = (),
    params: SamplingParams | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[list[int], list[float]]:
    """Continue one prompt with the most likely token each time.

    Args:
        params: penalties and biases to obey, and a grammar, for which the tokenizer is needed.

    Returns:
        Generated ids without the stop id, and the natural log-probability of each.
    """
    device = model.lm_head.weight.device
    written: list[int] = []
    logprobs: list[float] = []
    for _ in range(max_tokens):
        logits = model(torch.tensor([[*prompt, *written]], device=device))[0, -1]
        changed = logits if params is None else change(logits, prompt, written, params)
        if params is not None and params.has_grammar and tokenizer is not None:
            matcher = matcher_of(tokenizer, params)
            matcher.consume_tokens(written)
            if matcher.is_stopped():
                break
            allowed = torch.tensor(list(matcher.compute_logit_bias())) > 0
            changed = changed.masked_fill(~allowed, -torch.inf)
        token = int(changed.argmax())
        if token in stop_ids:
            break
        written.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        if len(prompt) + len(written) >= model.config.max_position_embeddings:
            break
    return written, logprobs


def change(
    logits: Tensor, prompt: Sequence[int], written: Sequence[int], params: SamplingParams
) -> Tensor:
    """Penalties and biases, one token at a time."""
    logits = logits.clone()
    for token in {*prompt, *written}:
        value, n = float(logits[token]), written.count(token)
        factor = params.repetition_penalty
        value = value / factor if value > 0 else value * factor
        value -= params.frequency_penalty * n
        logits[token] = value - (params.presence_penalty if n else 0)
    for token, bias in params.logit_bias:
        logits[token] += bias
    return logits
