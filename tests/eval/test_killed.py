"""P2: an evaluation that is killed at random moments ends with the same samples and scores."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

N_ROUNDS, N_KILLS = 4, 5  # a round starts in an empty folder


def start(folder, data):
    """A process that evaluates into the folder; returns when it begins to."""
    program = [sys.executable, str(Path(__file__).with_name("scripted.py")), str(folder), str(data)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(folder, data):
    """Let it come to its end; returns samples, results and how long it took."""
    begin = time.monotonic()
    with start(folder, data) as process:
        began = time.monotonic()
        assert process.wait(timeout=600) == 0
    results = json.loads((folder / "humaneval-t0.8-n4" / "results.json").read_text())
    del results["timing"]
    samples = (folder / "humaneval-t0.8-n4" / "samples.jsonl").read_bytes()
    assert began > begin
    return samples, results, time.monotonic() - began


@pytest.mark.slow
def test_p2_killed_at_twenty_moments(shared_data, tmp_path):
    samples, results, seconds = finish(tmp_path / "whole", shared_data)
    assert len(samples.splitlines()) == results["n_samples"] == 48
    assert set(results["outcomes"]) == {"failed", "passed"}
    rng, n_rows = random.Random(0), set()
    for number in range(N_ROUNDS):
        folder = tmp_path / f"round{number}"
        for _ in range(N_KILLS):
            with start(folder, shared_data) as process:
                time.sleep(rng.uniform(0, seconds / 2))
                process.kill()
            path = folder / "humaneval-t0.8-n4" / "samples.jsonl"
            n_rows.add(path.read_bytes().count(b"\n") if path.exists() else 0)
        assert finish(folder, shared_data)[:2] == (samples, results)
    assert n_rows - {0, 48}  # some were killed in the middle of sampling
