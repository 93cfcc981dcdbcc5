"""S3: the references of the real benchmarks pass with tests and candidate apart; stubs do not."""

import gzip
import json


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def humaneval_call(row, body):
    return {
        "candidate": row["prompt"] + body,
        "tests": row["test"],
        "entry_point": row["entry_point"],
        "setup": row["prompt"],
        "timeout_s": 30,
        "cpu_s": 5,
    }


def test_humaneval(pool, shared_data):
    problems = rows(shared_data / "humaneval" / "HumanEval.jsonl.gz")
    right = pool.judge_many(humaneval_call(row, row["canonical_solution"]) for row in problems)
    failed = [row["task_id"] for row, o in zip(problems, right, strict=True) if not o.passed]
    assert not failed, [o for o in right if not o.passed]
    assert len(right) == 164
    assert not any(o.used_objects or o.n_retries for o in right)
    wrong = pool.judge_many(humaneval_call(row, "    return None\n") for row in problems)
    assert {o.status for o in wrong} == {"failed"}


def mbpp_call(row, code):
    return {
        "candidate": code,
        "tests": row["test_list"],
        "setup": row.get("test_setup_code") or "\n".join(row.get("test_imports", [])),
        "timeout_s": 60,
        "cpu_s": 12,
    }


def test_mbpp(pool, shared_data):
    problems = rows(shared_data / "mbpp" / "mbpp.jsonl.gz")
    assert len(problems) == 974
    # Every sixth, and those whose tests make objects of the candidate's classes.
    problems = problems[::6] + [row for row in problems if row["task_id"] in (367, 601, 927)]
    outcomes = pool.judge_many(mbpp_call(row, row["code"]) for row in problems)
    assert not [o for o in outcomes if not o.passed]
    with_objects = {r["task_id"] for r, o in zip(problems, outcomes, strict=True) if o.used_objects}
    assert with_objects == {367, 927}
