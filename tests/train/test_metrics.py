import json
import os

import pytest
import torch

from codellama.rows import read_rows
from codellama.train.metrics import (
    METRICS_FILE,
    MetricsLog,
    _smooth,
    draw_curve,
    matrix_flops_per_s,
)


def row(step, **values):
    return {"step": step, "loss": 5.0 / step, "lr": 1e-3, **values}


def test_rows_reach_the_file_at_once(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write(row(step))
        assert read_rows(tmp_path / METRICS_FILE)[-1] == row(step)
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_resumed_run_drops_what_its_state_does_not_cover(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 8):
        log.write(row(step))
        if step in (5, 6):
            log.write({"step": step, "validation_loss": 3.0})
    log.close()
    log = MetricsLog(tmp_path, 5)
    log.write(row(6, again=True))
    log.close()
    rows = read_rows(tmp_path / METRICS_FILE)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 5, 6]
    assert rows[-1]["again"]


def test_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)) + "\n" + '{"step": 3, "lo')
    assert [r["step"] for r in read_rows(tmp_path / METRICS_FILE)] == [1, 2]
    MetricsLog(tmp_path, 2).close()
    assert path.read_text().endswith("\n")
    assert len(path.read_text().splitlines()) == 2


def test_not_finite_numbers_become_null(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(row(1, a=float("nan"), b=float("inf"), c=-float("inf"), d=True))
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == row(1, a=None, b=None, c=None, d=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_a_warning(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0)
    good = log._file
    log.write(row(1))
    with open("/dev/full", "ab", buffering=0) as full:
        log._file = full
        log.write(row(2))
        log.write(row(3))
    log._file = good
    log.write(row(4))  # there is space again: nothing is lost
    log.close()
    assert [r["step"] for r in read_rows(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("warning: ") == 1


def test_curve_is_a_picture(tmp_path):
    draw_curve(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing to draw yet
    rows = [row(1), {**row(2), "loss": None}, row(3), {"step": 3, "validation_loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    draw_curve(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_smoothed_curve_is_a_mean():
    assert _smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    smoothed = _smooth([0.0, 1.0])
    assert smoothed[0] == 0
    assert 0.5 < smoothed[1] < 0.52


def test_matrix_rate(monkeypatch):
    state = torch.get_rng_state()
    rate = matrix_flops_per_s("cpu", torch.float32, 128)
    assert 1e6 < rate < 1e15
    assert torch.equal(state, torch.get_rng_state())  # training's random numbers stay
    # Seven seconds a product: three are enough.
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert matrix_flops_per_s("cpu", torch.float32, 128) == pytest.approx(2 * 128**3 / 7)
    assert next(clock) == 6 * 7


def test_tensorboard_has_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 5.0 - step, "skipped": False})
    log.rewind(1)
    log.write({"step": 2, "loss": float("nan"), "lr": 0.5})
    log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 4.0)]
    assert [(event.step, event.value) for event in found.Scalars("lr")] == [(2, 0.5)]
