import json
import random
import shutil
import subprocess
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from codellama.recipe import Stage
from codellama.train.optim import make_optimizer
from codellama.train.state import StateWriter, load_latest_state

LOADER = {"n_lanes": 2, "lanes": [[3, 0, 17], [2, 1, 0]]}
FILES = ("tensors.safetensors", "manifest.json", "SHA256SUMS")


def make():
    """A small model and its optimiser, the same each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    stage = Stage(steps=10, batch_tokens=4096, peak_lr=1e-2)
    return model, make_optimizer(model, stage)


def save_state(run_dir, step, model, optimizer, position, keep):
    writer = StateWriter(run_dir, keep)
    writer.start(step, model, optimizer, position)
    writer.wait()


def update(model, optimizer):
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_steps(run_dir, steps, keep=10):
    model, optimizer = make()
    for step in range(1, max(steps) + 1):
        update(model, optimizer)
        if step in steps:
            save_state(run_dir, step, model, optimizer, LOADER | {"step": step}, keep)
    return model, optimizer


def folder(run_dir, step):
    return run_dir / "states" / f"step-{step:08d}"


def test_resumed_run_is_the_same(tmp_path):
    model, optimizer = save_steps(tmp_path, [3])
    other, its_optimizer = make()
    torch.manual_seed(99)
    assert load_latest_state(tmp_path, other, its_optimizer) == (3, LOADER | {"step": 3})
    for _ in range(4):
        update(other, its_optimizer)
    random_after = torch.rand(3)
    # The first one goes on, from the random state that was saved.
    model, optimizer = save_steps(tmp_path / "again", [3])
    for _ in range(4):
        update(model, optimizer)
    assert torch.equal(torch.rand(3), random_after)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], its_optimizer.state[b][key])


def test_nothing_saved_yet(tmp_path):
    assert load_latest_state(tmp_path, *make()) is None


def test_state_before_the_first_update(tmp_path):
    """All steps so far were skipped: the optimiser has no moments."""
    model, optimizer = make()
    save_state(tmp_path, 2, model, optimizer, LOADER, 2)
    other, its_optimizer = make()
    assert load_latest_state(tmp_path, other, its_optimizer) == (2, LOADER)
    for pair in ((model, optimizer), (other, its_optimizer)):
        torch.manual_seed(1)
        update(*pair)
    assert torch.equal(model[0].weight, other[0].weight)


def test_newest_are_kept(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == [
        *("step-00000003", "step-00000004"),
    ]


def test_old_states_go_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    model, optimizer = save_steps(tmp_path, [1, 2], keep=2)

    def no_space(tensors, path):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("codellama.train.state.save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, 3, model, optimizer, LOADER, keep=2)
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == [
        *("step-00000001", "step-00000002"),
    ]
    assert load_latest_state(tmp_path, *make())[0] == 2


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """What is written is a copy of the moment; the next state waits for it."""
    begun, may_go_on = threading.Event(), threading.Event()

    def slow(tensors, path):
        begun.set()
        assert may_go_on.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr("codellama.train.state.save_file", slow)
    model, optimizer = make()
    update(model, optimizer)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer = StateWriter(tmp_path, keep=2)
    writer.start(1, model, optimizer, LOADER)
    assert begun.wait(60)
    update(model, optimizer)  # does not wait for the disk
    assert load_latest_state(tmp_path, *make()) is None
    next_one = threading.Thread(target=writer.start, args=(2, model, optimizer, LOADER))
    next_one.start()
    may_go_on.set()
    next_one.join(60)
    writer.wait()
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == [
        *("step-00000001", "step-00000002"),
    ]
    for step, weights in ((1, expected), (2, model.state_dict())):
        written = load_file(folder(tmp_path, step) / "tensors.safetensors")
        for name, tensor in weights.items():
            assert torch.equal(written[f"model.{name}"], tensor)


def test_what_fails_in_the_thread_is_raised_once(tmp_path):
    (tmp_path / "states").write_text("a file where a folder belongs")
    model, optimizer = make()
    writer = StateWriter(tmp_path, keep=2)
    writer.start(7, model, optimizer, LOADER)
    with pytest.raises(OSError, match="train state of step 7 not saved"):
        writer.wait()
    writer.wait()


def damage_truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def damage_flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def damage_empty(path, rng):
    path.write_bytes(b"")


def damage_delete(path, rng):
    path.unlink()


DAMAGES = [(damage_truncate, 20), (damage_flip, 34), (damage_empty, 1), (damage_delete, 1)]


@pytest.fixture(scope="module")
def two_states(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    save_steps(run_dir, [3, 5])
    return run_dir


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("damage", "n"), DAMAGES, ids=lambda d: getattr(d, "__name__", ""))
def test_damaged_state_is_passed_over(two_states, tmp_path, capsys, file, damage, n):
    """Every place of every file: 60 cuts and 102 flipped bits in all."""
    rng = random.Random(0)
    expected, _ = save_steps(tmp_path / "reference", [3])
    for trial in range(n):
        run_dir = tmp_path / str(trial)
        shutil.copytree(two_states, run_dir)
        damage(folder(run_dir, 5) / file, rng)
        model, optimizer = make()
        assert load_latest_state(run_dir, model, optimizer) == (3, LOADER | {"step": 3})
        assert torch.equal(model[0].weight, expected[0].weight)
        message = capsys.readouterr().err
        assert str(folder(run_dir, 5)) in message
        assert "trying the state before it" in message
        assert message.count("\n") == 1


def test_all_damaged(two_states, tmp_path):
    shutil.copytree(two_states, tmp_path / "run")
    for step in (3, 5):
        damage_flip(folder(tmp_path / "run", step) / FILES[0], random.Random(step))
    with pytest.raises(ValueError, match=r"states: every train state is damaged; delete"):
        load_latest_state(tmp_path / "run", *make())


def test_swapped_states_are_noticed(two_states, tmp_path):
    """A whole file, but of another state."""
    shutil.copytree(two_states, tmp_path / "run")
    for name in FILES[:1]:
        shutil.copy(folder(tmp_path / "run", 3) / name, folder(tmp_path / "run", 5) / name)
    assert load_latest_state(tmp_path / "run", *make())[0] == 3


def test_damaged_newer_state_goes_when_the_run_saves_again(two_states, tmp_path):
    """It must not take the place of a good one among those that are kept."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_states, run_dir)
    damage_empty(folder(run_dir, 5) / FILES[0], None)
    model, optimizer = make()
    assert load_latest_state(run_dir, model, optimizer)[0] == 3
    save_state(run_dir, 4, model, optimizer, LOADER, keep=2)
    assert sorted(path.name for path in (run_dir / "states").iterdir()) == [
        *("step-00000003", "step-00000004"),
    ]


def test_restored_tensors_do_not_depend_on_the_file(two_states, tmp_path):
    shutil.copytree(two_states, tmp_path / "run")
    model, optimizer = make()
    load_latest_state(tmp_path / "run", model, optimizer)
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    path = folder(tmp_path / "run", 5) / FILES[0]
    with path.open("r+b") as file:  # in place, as another program could
        file.write(bytes(path.stat().st_size))
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], before)


def test_files_of_a_state(two_states):
    state = folder(two_states, 5)
    assert {path.name for path in state.iterdir()} == set(FILES)
    manifest = json.loads((state / "manifest.json").read_text())
    assert manifest["kind"] == "train-state"
    assert manifest["step"] == 5
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=state, check=True)
