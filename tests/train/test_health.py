import json
import math

import pytest

from codellama.train.health import MIN_STEPS, WINDOW_STEPS, Health


def ordinary(health, n, seed=0):
    for i in range(n):
        assert health.judge(2.0 + 0.1 * math.sin(i + seed), 1.0 + 0.2 * math.cos(i)) is None


@pytest.mark.parametrize("max_sigmas", [None, 6.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(max_sigmas, bad):
    health = Health(max_sigmas)
    assert health.judge(2.0, bad)
    assert health.judge(bad, 1.0)
    assert health.n_skipped == 2
    assert health.judge(2.0, 1.0) is None
    assert health.n_skipped == 0


def test_spikes_of_either_value():
    health = Health(6.0)
    ordinary(health, 60)
    assert "loss 3 is" in health.judge(3.0, 1.0)
    assert "gradient norm 4 is" in health.judge(2.0, 4.0)
    assert health.judge(1.0, 0.1) is None, "a fall is no spike"
    assert Health(None).judge(1e9, 1e9) is None


def test_first_steps_are_not_judged_by_deviation():
    health = Health(1e-9)
    for i in range(MIN_STEPS):
        assert health.judge(float(i), float(i * i)) is None
    assert health.judge(1e9, 1.0)


def test_a_spike_does_not_become_ordinary():
    health = Health(6.0)
    ordinary(health, 60)
    for _ in range(50):
        assert health.judge(3.0, 1.0)


def test_window_forgets():
    health = Health(6.0)
    ordinary(health, 60)
    for _ in range(WINDOW_STEPS):
        assert health.judge(2.2, 1.1) is None
    assert health.judge(2.3, 1.1), "only the last steps count"


def test_state_continues_alike():
    one = Health(6.0)
    ordinary(one, 100)
    one.judge(math.nan, 1.0)
    other = Health(6.0)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for loss in (2.05, 2.4, 2.9, 2.0):
        assert one.judge(loss, 1.0) == other.judge(loss, 1.0)
    assert one.state_dict() == other.state_dict()
