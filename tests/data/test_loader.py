import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_inputs import Failing, TextList, make_loader, make_texts

from codellama.data.loader import Batch, Loader

DOCUMENTS = TextList(make_texts(50))


def take(loader, n):
    return list(islice(loader, n))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in Batch._fields:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_batch_shapes_and_types(small_tokenizer):
    (batch,) = take(make_loader(DOCUMENTS, small_tokenizer), 1)
    assert all(field.shape == (4, 32) for field in batch)
    assert batch.loss_mask.dtype == torch.bool
    for name in ("tokens", "targets", "document_ids", "positions"):
        assert getattr(batch, name).dtype == torch.int64
    parts = list(batch.micro_batches(3))
    assert [len(part.tokens) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)


@pytest.mark.parametrize("n_workers", [1, 2, 3, 9])
def test_workers_give_the_same_batches(small_tokenizer, n_workers):
    inline = take(make_loader(DOCUMENTS, small_tokenizer), 12)
    with make_loader(DOCUMENTS, small_tokenizer, n_workers=n_workers) as loader:
        assert_same(take(loader, 12), inline)
        processes = [process for process, _ in loader._workers]
        assert len(processes) == min(n_workers, 4)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_partition_the_global_batch(small_tokenizer, world_size):
    whole = take(make_loader(DOCUMENTS, small_tokenizer), 10)
    ranks = [
        take(make_loader(DOCUMENTS, small_tokenizer, rank=rank, world_size=world_size), 10)
        for rank in range(world_size)
    ]
    joined = [
        Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(joined, whole)


def test_sequences_of_a_batch_differ(small_tokenizer):
    for batch in take(make_loader(DOCUMENTS, small_tokenizer), 10):
        assert len({tuple(row.tolist()) for row in batch.tokens}) == 4


@given(st.integers(0, 40))
@settings(max_examples=15, deadline=None)
def test_resumed_loader_continues(small_tokenizer, n_before):
    loader = make_loader(DOCUMENTS, small_tokenizer, max_document_chars=50)
    take(loader, n_before)
    state = json.loads(json.dumps(loader.state_dict()))
    assert len(json.dumps(state)) < 500
    resumed = make_loader(DOCUMENTS, small_tokenizer, max_document_chars=50)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 4), take(loader, 4))
    assert resumed.state_dict() == loader.state_dict()


def test_state_is_that_of_what_was_handed_out(small_tokenizer):
    """Not of what workers have computed ahead."""
    inline = make_loader(DOCUMENTS, small_tokenizer)
    take(inline, 3)
    with make_loader(DOCUMENTS, small_tokenizer, n_workers=2) as loader:
        take(loader, 3)
        time.sleep(0.5)
        state = loader.state_dict()
        assert state == inline.state_dict()
        following = take(loader, 3)
        # Going back in the same loader starts the workers again.
        loader.load_state_dict(state)
        assert_same(take(loader, 3), following)


def test_resumed_at_another_world_size(small_tokenizer):
    loader = make_loader(DOCUMENTS, small_tokenizer)
    take(loader, 5)
    state = loader.state_dict()
    expected = take(loader, 3)
    for rank in (0, 1):
        part = make_loader(DOCUMENTS, small_tokenizer, rank=rank, world_size=2)
        part.load_state_dict(state)
        for batch, whole in zip(take(part, 3), expected, strict=True):
            assert torch.equal(batch.tokens, whole.tokens[2 * rank : 2 * rank + 2])


def test_state_of_another_batch_size_is_refused(small_tokenizer):
    state = make_loader(DOCUMENTS, small_tokenizer, n_lanes=8).state_dict()
    with pytest.raises(ValueError, match="8 sequences a batch, this run has 4"):
        make_loader(DOCUMENTS, small_tokenizer).load_state_dict(state)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError("shard 7 is damaged"), OSError("disk is gone")])
def test_error_of_a_worker_is_raised(small_tokenizer, n_workers, error):
    documents = Failing(DOCUMENTS.texts, 30, error)
    loader = make_loader(documents, small_tokenizer, n_workers=n_workers)
    with loader, pytest.raises(type(error), match=str(error)):
        take(loader, 1000)


def test_unexpected_error_of_a_worker_is_noticed(small_tokenizer):
    documents = Failing(DOCUMENTS.texts, 30, KeyError("a bug"))
    loader = make_loader(documents, small_tokenizer, n_workers=2)
    with loader, pytest.raises(RuntimeError, match="loader process ended with exit code 1"):
        take(loader, 1000)


def test_error_while_opening_is_raised():
    def refuse():
        raise AssertionError

    missing = partial(Path.read_text, Path("/nothing/there"))
    settings_ = make_loader(DOCUMENTS, None)._settings
    loader = Loader(missing, refuse, settings_, n_lanes=2, n_workers=0)
    with pytest.raises(OSError, match="/nothing/there"):
        next(loader)


@pytest.mark.parametrize("seq_len", [32, 40_000])
def test_killed_worker_is_noticed(small_tokenizer, seq_len):
    """Also one that was in the middle of a message: long rows do not fit into a pipe."""
    options = {"n_workers": 2, "seq_len": seq_len}
    with make_loader(DOCUMENTS, small_tokenizer, **options) as loader:
        next(loader)
        time.sleep(1)
        os.kill(loader._workers[1][0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="loader process ended with exit code -9"):
            take(loader, 1000)


def test_signals_to_the_group_do_not_reach_workers(small_tokenizer):
    """Ctrl-C goes to all processes of a terminal; the training loop decides what to do."""
    with make_loader(DOCUMENTS, small_tokenizer, n_workers=1) as loader:
        expected = take(make_loader(DOCUMENTS, small_tokenizer), 20)
        first = next(loader)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(loader._workers[0][0].pid, number)
        time.sleep(0.3)
        assert_same([first, *take(loader, 19)], expected)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_stall_is_what_next_waited(small_tokenizer):
    loader = make_loader(DOCUMENTS, small_tokenizer)
    next(loader)
    assert loader.stall_s == 0  # starting is not stalling
    begin = time.perf_counter()
    take(loader, 20)
    assert 0 < loader.stall_s <= time.perf_counter() - begin
    with make_loader(DOCUMENTS, small_tokenizer, n_workers=1) as ahead:
        next(ahead)
        time.sleep(1)
        take(ahead, 5)
        assert ahead.stall_s < 0.5


PARENT = """
import sys, time
sys.path.insert(0, {folder!r})
from loader_inputs import TextList, make_loader, make_texts
from codellama.tokenizer import Tokenizer

if __name__ == "__main__":
    tokenizer = Tokenizer.load({tokenizer!r})
    documents = TextList(make_texts(50))
    loader = make_loader(documents, tokenizer, n_workers=2, seq_len={seq_len})
    next(loader)
    print(*(process.pid for process, _ in loader._workers), flush=True)
    {then}
"""


def start_parent(tmp_path, tokenizer, seq_len, then):
    tokenizer.save(tmp_path)
    values = {"folder": str(Path(__file__).parent), "tokenizer": str(tmp_path)}
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(**values, seq_len=seq_len, then=then))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    return parent, [int(number) for number in parent.stdout.readline().split()]


def wait_until_gone(numbers, within_s=20):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(map(psutil.pid_exists, numbers)):
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {[psutil.Process(n) for n in numbers if psutil.pid_exists(n)]}")


@pytest.mark.parametrize("seq_len", [32, 40_000])
def test_killed_parent_leaves_no_worker(tmp_path, small_tokenizer, seq_len):
    parent, workers = start_parent(tmp_path, small_tokenizer, seq_len, "time.sleep(600)")
    assert len(workers) == 2
    assert all(map(psutil.pid_exists, workers))
    parent.kill()
    parent.wait()
    wait_until_gone(workers)


def test_loader_that_is_never_closed_does_not_hold_the_program(tmp_path, small_tokenizer):
    parent, workers = start_parent(tmp_path, small_tokenizer, 32, "pass")
    assert parent.wait(timeout=60) == 0
    wait_until_gone(workers)


def test_workers_do_not_import_torch():
    """It would cost each of them 2 s and 200 MB."""
    program = (
        "import sys, codellama.data.worker, codellama.data.corpus, codellama.tokenizer; "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
