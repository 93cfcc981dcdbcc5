"""The choice among likely tokens against the choice among all."""

import random
from types import SimpleNamespace

import pytest
import torch

from codellama.engine import runner


@pytest.mark.parametrize("seed", range(20))
def test_sampling_among_likely_tokens_changes_nothing(seed, monkeypatch):
    monkeypatch.setattr(runner, "N_LIKELY", 16)
    dice = random.Random(seed)
    n_ids, width = dice.choice([(17, 1), (300, 4), (1000, 8)])
    logits = torch.randn(8, n_ids, generator=torch.Generator().manual_seed(seed)) * width
    if seed % 2:
        logits = logits.round()  # many are equal
    askers = []
    for _ in logits:
        params = SimpleNamespace(
            temperature=dice.choice([0.1, 0.8, 2.0]),
            top_p=dice.choice([0.0, 0.5, 0.95, 1.0]),
            top_k=dice.choice([0, 0, 1, 16, 40]),
            min_p=dice.choice([0.0, 0.0, 0.1]),
        )
        number = dice.choice([dice.random(), 0.0, 1 - 2**-24])
        askers.append((SimpleNamespace(params=params, draw=lambda _, number=number: number), 0))
    everything, _ = runner._draw(logits, askers, n_ids)
    likely, is_sure = runner._draw(logits, askers, 16)
    assert torch.equal(runner.sample(logits, askers), everything)
    assert torch.equal(likely[is_sure], everything[is_sure])
    assert bool(is_sure.any())
    assert seed != 3 or not bool(is_sure.all())
