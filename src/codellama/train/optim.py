"""The optimiser and its schedule: AdamW, linear warm-up, cosine decay (paper 2.6)."""

from __future__ import annotations

import math

import torch
from torch import nn

from codellama.recipe import Stage


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW in one fused kernel; weight decay acts on matrices, not on norms or frozen weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=stage.peak_lr, betas=stage.betas, eps=stage.eps, fused=True)


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of the update that takes `step` (counted from 0) to `step + 1`."""
    if step < stage.warmup_steps:
        return stage.peak_lr * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    floor = stage.final_lr_ratio
    return stage.peak_lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
