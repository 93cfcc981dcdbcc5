"""Validation: loss per token and bits per byte on documents that were never trained on.

Bits per byte does not depend on the vocabulary: it is what the model needs to encode the held-out
source text, divided by the size of that text, and so compares with gzip and xz.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from codellama.data.packing import Documents, Lane, PackedSequence, PackingSettings, Share
from codellama.model.attention import within_documents
from codellama.model.checkpoint import DTYPES
from codellama.model.transformer import Transformer
from codellama.recipe import Stage
from codellama.tokenizer import Tokenizer
from codellama.train.loss import CHUNK_TOKENS


@torch.no_grad()
def validate(
    model: Transformer, tokenizer: Tokenizer, documents: Documents, stage: Stage
) -> dict[str, float]:
    """Score held-out documents, left to right, packed as in training but never transformed.

    Stops after `validation_tokens`, or where the documents end. What the model needs for the end of
    a document counts, as the end has to be encoded too.

    Returns:
        validation_loss in nats per token; validation_bits_per_byte over the documents' bytes.
    """
    settings = PackingSettings(stage.seq_len, shuffle=False)
    lane = Lane([Share("validation", documents)], tokenizer, settings, 0, n_lanes=1)
    dtype = DTYPES[stage.dtype]
    device = next(model.parameters()).device
    n_bytes_of = torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    nats, n_tokens, n_bytes = 0.0, 0, 0
    n_rows = max(1, stage.validation_tokens // stage.seq_len)
    for begin in range(0, n_rows, stage.micro_batch):
        rows = _rows(lane, len(documents), min(stage.micro_batch, n_rows - begin))
        if not rows:
            break
        tokens, targets, mask, document_ids, positions, _ = (
            torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            attend = within_documents(document_ids.to(device))
            hidden = model.model(tokens.to(device), positions.to(device), attend)[mask.to(device)]
            for part, wanted in zip(
                hidden.split(CHUNK_TOKENS), targets[mask].split(CHUNK_TOKENS), strict=True
            ):
                logits = model.lm_head(part).float()
                nats += F.cross_entropy(logits, wanted.to(device), reduction="sum").item()
        n_tokens += int(mask.sum())
        n_bytes += int(n_bytes_of[targets[mask]].sum())
        if tokenizer.add_dummy_prefix:  # a space that is not in the text, in the first token
            begins_text = (tokens == tokenizer.bos_id) & (targets != tokenizer.eos_id) & mask
            n_bytes -= int(begins_text.sum())
    return {
        "validation_loss": nats / max(1, n_tokens),
        "validation_bits_per_byte": nats / math.log(2) / max(1, n_bytes),
    }


def _rows(lane: Lane, n_documents: int, n_rows: int) -> list[PackedSequence]:
    """The next rows, fewer where the documents end; none is scored twice."""
    rows: list[PackedSequence] = []
    while len(rows) < n_rows and (turn := lane.state.turns[0]) < n_documents:
        row = lane.next_sequence()
        is_repeated = turn + row.document_ids >= n_documents  # one document a turn
        rows.append(row._replace(loss_mask=row.loss_mask & ~is_repeated))
    return rows
