"""The model that a stage starts from: random, another stage's, or weights of any format."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from codellama.model.config import ModelConfig
from codellama.model.lora import add_adapters
from codellama.model.transformer import Transformer
from codellama.recipe import Recipe, Stage
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.variants import VARIANTS
from codellama.weights import build_model, open_weights

_PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm"}
N_ADDED_PIECES = 16  # what Code Llama adds to Llama 2's vocabulary (fact sheet 2.2)


def stage_config(recipe: Recipe, stage: Stage) -> ModelConfig:
    """The model's config in a stage, as the recipe alone tells it where it names a model.

    Raises:
        ValueError: it names none, and the weights that the stage comes from are not there.
    """
    if recipe.model is not None:
        config = ModelConfig.named(recipe.model.name).replace(**recipe.model.overrides)
        config = config.replace(max_position_embeddings=stage.seq_len)
    else:
        root = stage
        while root.init in recipe.stages:
            root = recipe.stages[root.init]
        config = open_weights(root.init).config
    changes: dict[str, Any] = {}
    if stage.variant is not None:
        changes["vocab_size"] = VARIANTS[stage.variant].vocab_size
    if stage.rope_theta is not None:
        changes["rope_theta"] = stage.rope_theta
    return config.replace(**changes)


def stage_tokenizer(recipe: Recipe, stage: Stage) -> Tokenizer:
    """The tokenizer that a stage trains with and leaves in its checkpoint.

    Raises:
        ValueError: there is none, or it is not of the stage's variant.
    """
    tokenizer = Tokenizer.load(recipe.tokenizer_dir, stage.variant)
    learns_dialogs = any(recipe.collections[name].dialogs for name in stage.mixture)
    if learns_dialogs and tokenizer.chat_format is None:
        return tokenizer.with_chat_format("inst")
    return tokenizer


def initial_model(recipe: Recipe, stage: Stage, tokenizer: Tokenizer) -> Transformer:
    """The float32 model that a stage starts from, ready to train.

    Raises:
        ValueError: the parent stage is not trained, its weights are damaged, or they do not fit the
            vocabulary.
    """
    if stage.init == "random":
        config = stage_config(recipe, stage)
        _check_vocabulary(config.vocab_size, tokenizer)
        model = Transformer(config)
        model.initialise(torch.Generator().manual_seed(stage.seed))
        return prepared(model, stage)
    parent: str | Path = stage.init
    if stage.init in recipe.stages:
        parent = recipe.run_dir(stage.init) / "checkpoint"
        if not parent.is_dir():
            raise ValueError(f"stage {stage.init!r} comes first: {parent} does not exist")
    loaded = build_model(open_weights(parent), dtype="float32")
    state = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    config = loaded.config
    config = config.replace(
        # Short dialogs do not take away the long context that an earlier stage gave.
        max_position_embeddings=max(config.max_position_embeddings, stage.seq_len),
        rope_theta=stage.rope_theta or config.rope_theta,
    )
    n_missing = tokenizer.vocab_size - config.vocab_size
    if n_missing == N_ADDED_PIECES:
        generator = torch.Generator().manual_seed(stage.seed)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = _with_rows(state[name], n_missing, config.initializer_range, generator)
        config = config.replace(vocab_size=tokenizer.vocab_size)
    elif n_missing == -N_ADDED_PIECES and stage.variant is not None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][: tokenizer.vocab_size].clone()
        config = config.replace(vocab_size=tokenizer.vocab_size)
    _check_vocabulary(config.vocab_size, tokenizer)
    model = Transformer(config)
    model.load_state_dict(state)
    return prepared(model, stage)


def prepared(model: Transformer, stage: Stage) -> Transformer:
    """Put in what a stage asks for besides weights: adapters, recomputation."""
    if stage.lora is not None:
        add_adapters(model, stage.lora, stage.seed)
    if stage.recompute != "none":
        keep = _keeping_products if stage.recompute == "selective" else noop_context_fn
        for block in model.model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=keep)
    return model.train()


def _keeping_products() -> Any:
    """Keep what matrix products and attention gave; the cheap rest is computed again."""

    def policy(_: object, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        name = str(getattr(operation, "overloadpacket", operation))
        is_product = name in _PRODUCTS or "attention" in name
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _with_rows(weight: Tensor, n_rows: int, std: float, generator: torch.Generator) -> Tensor:
    """Add rows for the infilling pieces; the paper does not say how they begin."""
    rows = nn.init.normal_(weight.new_empty(n_rows, weight.shape[1]), 0, std, generator)
    return torch.cat((weight, rows))


def _check_vocabulary(n_rows: int, tokenizer: Tokenizer) -> None:
    if n_rows != tokenizer.vocab_size:
        raise ValueError(f"the model has vocab_size {n_rows}, the tokenizer {tokenizer.vocab_size}")
