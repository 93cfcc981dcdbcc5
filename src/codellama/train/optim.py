"""The optimiser and its schedule: AdamW (or Muon), linear warm-up, cosine decay (paper 2.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from codellama.recipe import Stage


class Muon:
    """Muon for the matrices within the blocks, AdamW for embeddings, output and norms, as one.

    An update of a matrix is its momentum with all singular values brought to about 1, so that the
    faint directions of queries and keys learn as fast as the strong ones. Scaled to the size of an
    AdamW update, so that both take the same rate. Not in the paper; see docs/experiments.md.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], others: torch.optim.AdamW, lr: float):
        decay = others.param_groups[0]["weight_decay"]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, others)
        self.param_groups = [*muon.param_groups, *others.param_groups]
        self.state = muon.state = others.state  # by parameter, of which they have none in common

    def step(self) -> None:
        """Update all weights."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)


Optimizer = torch.optim.AdamW | Muon


def make_optimizer(model: nn.Module, stage: Stage) -> Optimizer:
    """AdamW in one fused kernel; weight decay acts on matrices, not on norms or frozen weights.

    Raises:
        ValueError: Muon is asked for weights that are shared out over processes.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = [p for name, p in named.items() if ".layers." in f".{name}" and p.ndim == 2]
    by_muon = set(inner) if stage.optimizer == "muon" else set()
    if any(isinstance(p, DTensor) for p in by_muon):
        raise ValueError('optimizer = "muon" needs whole matrices: start it in one process')
    parameters = [p for p in named.values() if p not in by_muon]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(
        groups, lr=stage.peak_lr, betas=stage.betas, eps=stage.eps, fused=True
    )
    return Muon(inner, adamw, stage.peak_lr) if by_muon else adamw


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of the update that takes `step` (counted from 0) to `step + 1`."""
    if step < stage.warmup_steps:
        return stage.peak_lr * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    floor = stage.final_lr_ratio
    return stage.peak_lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
