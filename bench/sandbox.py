"""How fast the sandbox runs and judges, beside what one does without it, in one sitting.

Prints a table and, as its last line, one JSON object. Usage: python bench/sandbox.py [--n 400]
"""

import argparse
import gzip
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from codellama.sandbox import Pool

PROGRAM = "n = int(input())\nprint(sum(i * i for i in range(n)))\n"
CANDIDATE = "def f(x):\n    return x * x\n"
TESTS = "".join(f"assert f({n}) == {n * n}\n" for n in range(7))


def per_second(n, seconds):
    return round(n / seconds, 1)


def timed(function):
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def bare(_=None):
    """A bare interpreter without any isolation."""
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM], input=b"100", capture_output=True, check=True
    )


def forked(source, results):
    exec(source, {})
    results.append("passed")


def forked_check(source):
    """As the original HumanEval harness: a fork, a manager's list for the result, a join."""
    with multiprocessing.Manager() as manager:
        results = manager.list()
        process = multiprocessing.Process(target=forked, args=(source, results))
        process.start()
        process.join(5)
        return list(results) == ["passed"]


def humaneval():
    root = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    path = Path(os.environ.get("CODELLAMA_DATA") or root) / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def call_of(row):
    return {
        "candidate": row["prompt"] + row["canonical_solution"],
        "tests": row["test"],
        "entry_point": row["entry_point"],
        "setup": row["prompt"],
        "timeout_s": 15,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=400)
    n = parser.parse_args().n
    n_workers = len(os.sched_getaffinity(0))
    facts = {"n": n, "n_workers": n_workers, "load_before": os.getloadavg()[0]}

    pool, facts["start_s"] = timed(lambda: Pool(n_workers))
    with pool:
        runs = [{"program": PROGRAM, "stdin": "100"}] * n
        judged = [{"candidate": CANDIDATE, "tests": TESTS}] * n
        pool.run_many(runs[:20])
        pool.judge_many(judged[:20])
        outcomes, seconds = timed(lambda: pool.run_many(runs))
        assert all(o.stdout == "328350\n" for o in outcomes)
        facts["runs_per_s"] = per_second(n, seconds)
        outcomes, seconds = timed(lambda: pool.judge_many(judged))
        assert all(o.passed for o in outcomes)
        facts["judged_per_s"] = per_second(n, seconds)
        facts["run_alone_ms"] = 1e3 * statistics.median(
            timed(lambda: pool.run(PROGRAM, "100"))[1] for _ in range(50)
        )
        facts["judge_alone_ms"] = 1e3 * statistics.median(
            timed(lambda: pool.judge(CANDIDATE, TESTS))[1] for _ in range(50)
        )
        overruns = []
        for program in ("while True: pass", "import time\ntime.sleep(9)"):
            for _ in range(5):
                outcome, seconds = timed(lambda p=program: pool.run(p, timeout_s=0.5))
                assert outcome.status == "timeout"
                overruns.append(seconds - 0.5)
        facts["worst_overrun_s"] = max(overruns)
        if rows := humaneval():
            outcomes, seconds = timed(lambda: pool.judge_many([call_of(row) for row in rows] * 2))
            facts["humaneval_passed"] = sum(o.passed for o in outcomes) // 2
            facts["humaneval_per_s"] = per_second(len(outcomes), seconds)

    with ThreadPoolExecutor(n_workers) as threads:
        _, seconds = timed(lambda: list(threads.map(bare, range(n))))
        facts["bare_interpreter_per_s"] = per_second(n, seconds)
        sources = [
            f"{c['candidate']}\n{c['tests']}\ncheck({c['entry_point']})"
            for c in map(call_of, rows[:164])
        ] or [CANDIDATE + TESTS] * 100
        passed, seconds = timed(lambda: list(threads.map(forked_check, sources)))
        assert all(passed)
        facts["fork_and_manager_per_s"] = per_second(len(sources), seconds)

    for name, value in facts.items():
        print(f"{name:<28} {value if isinstance(value, int) else round(value, 3)}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
