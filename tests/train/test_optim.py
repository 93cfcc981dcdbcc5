from itertools import pairwise

import pytest
import torch
from torch import nn

from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer
from codellama.recipe import Stage
from codellama.train.optim import learning_rate, make_optimizer

STAGE = Stage(steps=100, batch_tokens=4096, peak_lr=3e-4, warmup_steps=10)


def test_schedule():
    rates = [learning_rate(STAGE, step) for step in range(100)]
    assert rates[0] == pytest.approx(3e-5)  # the first update is not wasted
    assert rates[9] == rates[10] == pytest.approx(3e-4) == max(rates)
    assert rates[99] == pytest.approx(3e-4 / 30) == min(rates[10:])
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    # Half of the way down at half of the time.
    halfway = learning_rate(STAGE.model_copy(update={"steps": 101 + 10}), 60)
    assert halfway == pytest.approx((3e-4 + 3e-4 / 30) / 2)


def test_schedule_at_its_edges():
    short = STAGE.model_copy(update={"steps": 5})
    assert learning_rate(short, 4) == pytest.approx(1.5e-4)  # still warming up
    none = STAGE.model_copy(update={"warmup_steps": 0})
    assert learning_rate(none, 0) == pytest.approx(3e-4)
    one = STAGE.model_copy(update={"warmup_steps": 0, "steps": 1})
    assert 0 < learning_rate(one, 0) <= 3e-4
    assert learning_rate(STAGE, 1000) == pytest.approx(1e-5)  # never rises again


def test_decay_is_for_matrices_only():
    model = Transformer(ModelConfig(16, 1, 2, 2, 32, 50))
    optimizer = make_optimizer(model, STAGE)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] for p in others["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.9, 0.95), 1e-5, True)


def test_update_is_that_of_adamw():
    """One matrix and one vector, by the formula of the paper."""
    module = nn.Module()
    module.matrix = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    module.vector = nn.Parameter(torch.tensor([1.0, -1.0]))
    before = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    optimizer = make_optimizer(module, STAGE)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in before.items()}
    for step in range(1, 4):
        for name, parameter in module.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * step)
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * step * 0.1)
            second.mul_(0.95).add_((0.1 * step) ** 2 * 0.05)
            if name == "matrix":
                before[name] *= 1 - 3e-4 * 0.1
            denominator = (second / (1 - 0.95**step)).sqrt() + 1e-5
            before[name] -= 3e-4 * first / (1 - 0.9**step) / denominator
        optimizer.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.double(), before[name], rtol=1e-6, atol=1e-7)
