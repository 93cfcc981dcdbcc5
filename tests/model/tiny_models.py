"""Models of a few thousand parameters."""

import torch

from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer

TINY = {
    "multi-head": ModelConfig(32, 2, 4, 4, 56, 67, rope_theta=1e4, max_position_embeddings=64),
    "grouped-query": ModelConfig(32, 3, 4, 2, 56, 67, rope_theta=1e6, max_position_embeddings=64),
}


def tiny_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A random model whose logits are about as large as real ones."""
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 would hide most mistakes
            if parameter.ndim > 1:
                parameter.mul_(10)
            else:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model.eval()
