"""Many processes train as one: the same losses and, within rounding, the same weights.

The tolerance is that of sums in another order: gradients are added up over ranks in float32, so
losses of 24 steps agree to 1e-5 relative, not to the bit.
"""

import json
import signal

import pytest
from projects import make_project, training_rows

from codellama.model.checkpoint import load_checkpoint
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer
from codellama.train.parallel import Layout, make_layout

LAYOUTS = {
    "2 shards": {"ranks": 2},
    "2 tensor": {"ranks": 2, "n_tensor": 2},
    "2 replicas": {"ranks": 2, "n_replicas": 2},
    "2 contexts": {"ranks": 2, "n_context": 2},
    "4 shards": {"ranks": 4},
    "2 shards x 2 tensor": {"ranks": 4, "n_tensor": 2},
    "2 replicas x 2 shards": {"ranks": 4, "n_replicas": 2},
    "2 shards x 2 contexts": {"ranks": 4, "n_context": 2},
    "2 replicas x 2 contexts": {"ranks": 4, "n_replicas": 2, "n_context": 2},
    "2 replicas x 2 tensor": {"ranks": 4, "n_replicas": 2, "n_tensor": 2},
}


@pytest.fixture(scope="module")
def alone(run_in_children, tmp_path_factory):
    work = tmp_path_factory.mktemp("alone")
    make_project(work)
    (result,) = run_in_children(work, {})
    assert result["code"] == 0, result["log"]
    return work


@pytest.fixture
def work(tmp_path):
    make_project(tmp_path)
    return tmp_path


def assert_near(work, alone, rel=1e-5):
    ours, theirs = training_rows(work), training_rows(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=rel)
    one, other = (
        load_checkpoint(folder / "runs/code/checkpoint", dtype="float32").state_dict()
        for folder in (work, alone)
    )
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-3, name


def validations(work):
    rows = map(json.loads, (work / "runs/code/metrics.jsonl").read_text().splitlines())
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_equal_those_of_one_process(run_in_children, alone, work, name):
    (result,) = run_in_children(work, LAYOUTS[name])
    assert result["code"] == 0, result["log"]
    assert_near(work, alone)
    assert validations(work) == pytest.approx(validations(alone), rel=1e-5)
    reports = [json.loads((f / "runs/code/mixture.json").read_text()) for f in (work, alone)]
    assert reports[0] == reports[1]
    manifests = [
        json.loads((f / "runs/code/states/step-00000024/manifest.json").read_text())
        for f in (work, alone)
    ]
    assert manifests[0]["position"]["loader"] == manifests[1]["position"]["loader"]


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, LAYOUTS["2 shards"]), (LAYOUTS["2 shards"], {}), (LAYOUTS["2 tensor"], {"ranks": 4})],
    ids=["1 to 2", "2 to 1", "2 tensor to 4 shards"],
)
def test_goes_on_with_other_processes(run_in_children, alone, work, before, after):
    """Goal T7: from a train state of one layout in another."""
    stopped, last = run_in_children(
        work, {**before, "signal_at_step": [int(signal.SIGTERM), 10]}, after
    )
    assert (stopped["code"], last["code"]) == (7, 0), (stopped["log"], last["log"])
    assert "resumed at step 10" in last["log"]
    assert_near(work, alone)


def test_the_same_layout_resumes_to_the_bit(run_in_children, work, tmp_path):
    layout = LAYOUTS["2 shards"]
    whole = tmp_path / "whole"
    whole.mkdir()
    make_project(whole)
    run_in_children(whole, layout)
    killed, last = run_in_children(work, {**layout, "kill": ["step", 11]}, layout)
    assert killed["code"] != 0
    assert last["code"] == 0, last["log"]
    assert "resumed at step 9" in last["log"]
    weights = "runs/code/checkpoint/model.safetensors"
    assert (work / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_dead_rank_ends_the_others(run_in_children, work):
    """Goal T10: within 60 s, and what follows resumes."""
    dead, last = run_in_children(work, {"ranks": 2, "kill_rank_at_step": [1, 8]}, {"ranks": 2})
    assert dead["code"] != 0
    assert dead["seconds"] < 60
    assert last["code"] == 0, last["log"]
    assert "resumed at step 6" in last["log"]


def test_processes_that_do_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="6 processes do not divide into 2 replicas x 2 tensor"):
        make_layout("cpu", 2, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert make_layout("cpu") == Layout()


def test_heads_that_do_not_divide(run_in_children, work):
    (result,) = run_in_children(work, {"ranks": 4, "n_tensor": 4})
    assert result["code"] != 0
    assert "2 key-value heads" in result["log"]


def test_one_process_is_left_as_it_is():
    from codellama.train.parallel import distribute, gathered

    model = Transformer(ModelConfig(32, 2, 4, 2, 64, 97))

    def loss(*_):
        raise AssertionError

    assert distribute(model, Layout(), loss) is loss
    with gathered(model):
        pass
