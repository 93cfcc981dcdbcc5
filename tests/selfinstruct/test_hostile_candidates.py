"""Every hostile program of the sandbox's tests as a candidate solution: none passes, all count."""

import os
from collections import Counter
from pathlib import Path

import pytest

from codellama.rows import read_rows
from codellama.selfinstruct import execute as executing
from codellama.selfinstruct.execute import Job, execute
from codellama.selfinstruct.select import passed_tests, solution_jobs

STATUSES = {"failed", "timeout", "memory", "output", "crashed"}


@pytest.mark.slow
@pytest.mark.parametrize("each_test", [False, True])
def test_no_hostile_candidate_passes(each_test, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "sandbox")
    monkeypatch.setattr(executing, "calibrate", lambda: 1.0)  # all are wrong, however slow it is
    from test_hostile import ATTACKS
    from test_judge import FORGERIES, TESTS

    own = {"@pid@": str(os.getpid()), "@other@": str(os.getpid()), "@port@": "22"}
    attacks = [program for program, _ in ATTACKS.values()]
    for key, value in own.items():
        attacks = [program.replace(key, value) for program in attacks]
    problem = {"id": "f", "tests": TESTS.splitlines()}
    candidates = [*FORGERIES.values(), *([] if each_test else attacks)]
    jobs = solution_jobs(problem, candidates, each_test)
    rows = execute(jobs, tmp_path / "runs.jsonl", 0.4)
    counts = Counter(row["status"] for row in rows.values())
    assert counts.total() == len(jobs) == len(read_rows(tmp_path / "runs.jsonl"))
    assert counts.keys() <= STATUSES | ({"passed"} if each_test else set())
    # A wrong function passes one test or another; none passes all.
    if each_test:
        assert all(len(held) < 3 for held in passed_tests(problem, len(candidates), rows))
    right = Job("right", "def f(x): return x * x", TESTS)
    assert execute([right], tmp_path / "right.jsonl", 5.0)["right"]["status"] == "passed"
