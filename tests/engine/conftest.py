"""A small random model with room for a few hundred tokens."""

import pytest
import torch

from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer


@pytest.fixture(scope="session")
def long_model(small_tokenizer):
    config = ModelConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_position_embeddings=512)
    # A wide initialisation: confident, varied predictions, far from ties.
    model = Transformer(config.replace(initializer_range=0.4))
    model.initialise(torch.Generator().manual_seed(3))
    return model.eval().requires_grad_(False)
