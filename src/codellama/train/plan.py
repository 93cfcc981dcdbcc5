"""What a stage will cost, worked out before anything runs."""

from __future__ import annotations

from typing import Any

import torch

from codellama.model.checkpoint import DTYPES
from codellama.model.config import ModelConfig
from codellama.recipe import Recipe
from codellama.train.metrics import matrix_flops_per_s

ASSUMED_MFU = 0.2  # of the measured matrix rate; seen with `tiny` on two cores


def plan(recipe: Recipe, stage_name: str) -> dict[str, Any]:
    """Parameters, tokens, FLOPs, memory and hours of a stage on this machine.

    Memory counts weights, gradients and both moments in float32; activations come on top.

    Raises:
        ValueError: no such stage or model.
    """
    stage = recipe.stage(stage_name)
    config = ModelConfig.named(recipe.model.name).replace(**recipe.model.overrides)
    n_tokens = stage.steps * stage.batch_tokens
    flops = n_tokens * config.train_flops_per_token(stage.seq_len)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = matrix_flops_per_s(device, DTYPES[stage.dtype])
    return {
        "stage": stage_name,
        "init": stage.init,
        "parameters": config.n_params,
        "steps": stage.steps,
        "tokens": n_tokens,
        "tokens_per_step": stage.batch_tokens,
        "seq_len": stage.seq_len,
        "flops": flops,
        "state_bytes": 16 * config.n_params,
        "machine_matrix_flops_per_s": round(rate),
        "assumed_mfu": ASSUMED_MFU,
        "estimated_hours": round(flops / (rate * ASSUMED_MFU) / 3600, 2),
    }
