"""Validation: loss per token and bits per byte on documents that were never trained on.

Bits per byte does not depend on the vocabulary: it is what the model needs to encode the held-out
source text, divided by the size of that text, and so compares with gzip and xz.
"""

from __future__ import annotations

import math

import torch

from codellama.data.packing import Documents, Lane, PackingSettings
from codellama.model.attention import within_documents
from codellama.model.checkpoint import DTYPES
from codellama.model.transformer import Transformer
from codellama.recipe import Stage
from codellama.tokenizer import Tokenizer


@torch.no_grad()
def validate(
    model: Transformer, tokenizer: Tokenizer, documents: Documents, stage: Stage
) -> dict[str, float]:
    """Score held-out documents, left to right, packed as in training but never transformed.

    Returns:
        validation_loss in nats per token; validation_bits_per_byte over the documents' bytes.
    """
    settings = PackingSettings(stage.seq_len, shuffle=False)
    lane = Lane(documents, tokenizer, settings, lane=0, n_lanes=1)
    dtype = DTYPES[stage.dtype]
    device = next(model.parameters()).device
    n_bytes_of = torch.tensor([_n_bytes(tokenizer, i) for i in range(tokenizer.vocab_size)])
    nats, n_tokens, n_bytes = 0.0, 0, 0
    n_rows = max(1, stage.validation_tokens // stage.seq_len)
    for begin in range(0, n_rows, stage.micro_batch):
        size = min(stage.micro_batch, n_rows - begin)
        columns = zip(*(lane.next_sequence() for _ in range(size)), strict=True)
        tokens, targets, mask, document_ids, positions = (
            torch.stack([torch.from_numpy(row) for row in column]) for column in columns
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(
                tokens.to(device), positions.to(device), within_documents(document_ids.to(device))
            )
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(device), reduction="none"
        )
        nats += losses[mask.flatten().to(device)].double().sum().item()
        n_tokens += int(mask.sum())
        n_bytes += int(n_bytes_of[targets[mask]].sum())
    return {
        "validation_loss": nats / n_tokens,
        "validation_bits_per_byte": nats / math.log(2) / n_bytes,
    }


def _n_bytes(tokenizer: Tokenizer, token_id: int) -> int:
    """Bytes of text that an id stands for; control ids stand for none."""
    return len(tokenizer.token_bytes(token_id))
