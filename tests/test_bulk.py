"""Completions of many prompts: killed, continued, and the same over HTTP's interface."""

import json
import subprocess
import sys
import time

import pytest

from codellama import Engine, SamplingParams
from codellama.bulk import complete_into
from codellama.commands.generate import complete

PROMPTS = [f"def f{i}(x):\n    return x" for i in range(40)]
PARAMS = SamplingParams(12, temperature=0.8, seed=5, n=2)
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_bulk import PARAMS, PROMPTS
from codellama import Engine
from codellama.bulk import complete_into
complete_into(Path(sys.argv[1]), Engine(dtype="float32", max_batch=4), PROMPTS, PARAMS)
"""


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_killed_run_is_continued(tmp_path):
    """Killed while rows are written, its last line torn, and called again: as if undisturbed."""
    path, whole = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), __file__.rpartition("/")[0]]
    )
    deadline = time.monotonic() + 600
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    with path.open("ab") as file:
        file.write(b'{"index": 39, "prom')
    n_before = path.read_bytes().count(b"\n")
    assert n_before < len(PROMPTS)
    engine = Engine(dtype="float32")
    told = []
    rows = complete_into(path, engine, PROMPTS, PARAMS, lambda *n: told.append(n))
    assert told[0] == (n_before, len(PROMPTS))
    assert told[-1] == (len(PROMPTS), len(PROMPTS))
    assert [row["index"] for row in rows] == list(range(len(PROMPTS)))
    again = complete_into(whole, engine, PROMPTS, PARAMS)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(rows))
    assert sorted(r["index"] for r in rows_of(path)) == list(range(len(PROMPTS)))
    direct = engine.complete(PROMPTS, PARAMS)
    texts = [completion["text"] for row in rows for completion in row["completions"]]
    assert texts == [completion.text for completion in direct]
    n_bytes = path.stat().st_size
    complete_into(path, engine, PROMPTS, PARAMS)  # nothing is left
    assert path.stat().st_size == n_bytes


def test_rows_of_other_prompts_are_refused(tmp_path):
    engine = Engine()
    path = tmp_path / "a.jsonl"
    complete_into(path, engine, PROMPTS[:2], SamplingParams(2))
    with pytest.raises(ValueError, match="row 0 is of another prompt or other settings"):
        complete_into(path, engine, PROMPTS[:2], SamplingParams(3))
    with pytest.raises(ValueError, match="row 0 is of another prompt"):
        complete_into(path, engine, PROMPTS[1:], SamplingParams(2))


def test_what_is_cancelled_is_asked_again(tmp_path):
    engine = Engine()
    path = tmp_path / "a.jsonl"
    rows = complete_into(
        path, engine, PROMPTS, SamplingParams(40), lambda n, _: engine.cancel() if n == 1 else None
    )
    assert len(rows) < len(PROMPTS)
    assert len(complete_into(path, engine, PROMPTS, SamplingParams(40))) == len(PROMPTS)


def test_the_command_writes_rows(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "x = "}\n{"prompt": "y = "}\n')
    complete(prompts=prompts, out=out, max_tokens=3)
    assert [row["index"] for row in rows_of(out)] == [0, 1]
    prompts.write_text('{"text": "x = "}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl: expected lines of"):
        complete(prompts=prompts, out=out, max_tokens=3)
