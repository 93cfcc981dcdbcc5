"""Samples files: what is read, written, and refused."""

import gzip
import json

import pytest
from scripted import Sums

from codellama.eval.samples import Sample, read_samples, write_samples

GOOD = [{"task_id": f"sum/{i}", "completion": str(i + 1)} for i in range(3)]


def written(tmp_path, rows):
    path = tmp_path / "samples.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_files_of_other_tools(tmp_path):
    path = written(tmp_path, [*GOOD, "", *GOOD])
    samples = read_samples(path, Sums())
    assert [s.number for s in samples] == [0, 0, 0, 1, 1, 1]
    packed = tmp_path / "samples.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_samples(packed, Sums()) == samples


@pytest.mark.parametrize("evalplus", [False, True])
def test_round_trip(tmp_path, evalplus):
    path = tmp_path / "samples.jsonl"
    samples = [Sample(f"sum/{i}", f"é{i}\n", 0) for i in range(3)]
    write_samples(path, Sums(), samples, evalplus)
    assert read_samples(path, Sums()) == samples
    assert ("solution" in path.read_text()) == evalplus


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*GOOD, "{"], r":4: not JSON"),
        ([*GOOD, "[" * 100_000], r":4: not JSON"),
        ([*GOOD, "[1]"], r':4: expected an object with "task_id" and "completion"'),
        ([*GOOD, "3"], r":4: expected an object"),
        ([*GOOD, {"task_id": "sum/0"}], r":4: expected an object"),
        ([*GOOD, {"task_id": "sum/0", "completion": 3}], r":4: .* are texts"),
        ([*GOOD, {"task_id": "sum/9", "completion": ""}], r":4: task_id 'sum/9' is no problem"),
        ([GOOD[0] | {"sample": 0}, GOOD[0] | {"sample": 0}], r":2: sample 0 of sum/0 is also on"),
        ([GOOD[0] | {"sample": "x"}], r":1: sample = 'x'"),
        (GOOD[:2], r"no samples for 1 of 3 problems \(sum/2\); --partial"),
        ([*GOOD, GOOD[1]], r"unequal numbers of samples: 1 for most problems, but 2 for sum/1"),
        ([""], "no samples in the file"),
    ],
)
def test_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_samples(written(tmp_path, rows), Sums())


def test_partial_on_request(tmp_path):
    path = written(tmp_path, [GOOD[0], GOOD[0], GOOD[1]])
    assert len(read_samples(path, Sums(), partial=True)) == 3


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x1f\x8b\x08broken"])
def test_unreadable(tmp_path, content):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_samples(path, Sums())
    with pytest.raises(ValueError, match="no such samples file"):
        read_samples(tmp_path / "nothing", Sums())
