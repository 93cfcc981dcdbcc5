"""Damaged weights are refused in one line, quickly, within bounded memory (goal L1)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("n_cases", "seed"), [(1500, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)]
)
def test_damaged_weights(tmp_path, n_cases, seed):
    script = Path(__file__).with_name("fuzz_weights.py")
    command = [sys.executable, script, tmp_path, str(n_cases), str(seed)]
    # A process of its own: a crash of the interpreter is a finding too, and memory is its own.
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["refused"] > n_cases / 3
    assert result["slowest_s"] < 1
    assert result["growth_bytes"] < 2 * result["largest_file_bytes"] + (64 << 20)
    assert result["beside"] == ["case", "case.gguf"]
