"""The slow, obvious generator: the whole text through the model again for every token.

No cache, no batch, no shortcuts; every engine test is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from codellama.model.transformer import Transformer


@torch.inference_mode()
def generate_greedy(
    model: Transformer, prompt: Sequence[int], max_tokens: int, stop_ids: Collection[int] = ()
) -> tuple[list[int], list[float]]:
    """Continue one prompt with the most likely token each time.

    Returns:
        Generated ids without the stop id, and the natural log-probability of each.
    """
    device = model.lm_head.weight.device
    tokens = list(prompt)
    logprobs: list[float] = []
    for _ in range(max_tokens):
        logits = model(torch.tensor([tokens], device=device))[0, -1]
        token = int(logits.argmax())
        if token in stop_ids:
            break
        tokens.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        if len(tokens) >= model.config.max_position_embeddings:
            break
    return tokens[len(prompt) :], logprobs
