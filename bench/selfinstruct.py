"""Self-instruct beside its own limits: execution and the sandbox, generation and the engine.

Execution: the rate at which `execute` writes rows, beside the rate of the same programs handed to a
pool of jails and forgotten. Generation: tokens a second of the solutions step, beside the engine
given the same prompts in one call. Each the best of `--rounds`.

    python bench/selfinstruct.py --jobs 2000 --problems 64
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from codellama.engine import Engine
from codellama.engine.sampling import SamplingParams
from codellama.recipe_selfinstruct import SolutionWriter
from codellama.sandbox import Pool
from codellama.selfinstruct.asking import ask
from codellama.selfinstruct.execute import Job, execute
from codellama.selfinstruct.solutions import prompt

PROGRAM = "def f(items, k):\n    return sorted(items)[k:] + {number} * [k]\n"
TESTS = "assert f([3, 1, 2], 0) == [1, 2, 3]\nassert f([1], 1) == []\nassert len(f([], 2)) == 0\n"


def jobs_of(n):
    """As candidates are: different programs, of which one in eight passes."""
    return [Job(str(i), PROGRAM.format(number=i % 8) + f"# {i}\n", TESTS) for i in range(n)]


def rate_of_execute(jobs):
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        rows = execute(jobs, Path(folder) / "runs.jsonl", 2.0)
        seconds = time.perf_counter() - begin
    assert sum(row["status"] == "passed" for row in rows.values()) == -(-len(jobs) // 8)
    return len(jobs) / seconds


def rate_of_pool(jobs, pool):
    begin = time.perf_counter()
    pool.judge_many([{"candidate": j.program, "tests": j.tests, "timeout_s": 6} for j in jobs])
    return len(jobs) / (time.perf_counter() - begin)


def problems_of(n):
    return [
        {
            "id": str(i),
            "question": "",
            "prose": f"Return the items that are larger than {i}, doubled.",
            "name": "f",
            "head": "def f(items):",
            "tests": [f"assert f([{i + 1}]) == [{2 * i + 2}]"],
        }
        for i in range(n)
    ]


def rates_of_generation(engine, problems, n):
    role = SolutionWriter(style="code", n=n, max_tokens=64)
    prompts = [(p["id"], prompt(role, p)) for p in problems]
    n_tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "solutions.jsonl"
        begin = time.perf_counter()
        ask(role, prompts, path, lambda role: engine, lambda text: None)
        seconds = time.perf_counter() - begin
        for line in path.read_text().splitlines():
            n_tokens += len(engine.tokenizer.encode(json.loads(line)["completion"]))
    params = SamplingParams(max_tokens=64, temperature=0.8, top_p=0.95, n=n, seed=0,
                            stop=prompts[0][1].stop)  # fmt: skip
    begin = time.perf_counter()
    results = engine.complete([p.text for _, p in prompts], params)
    alone_s = time.perf_counter() - begin
    n_alone = sum(len(engine.tokenizer.encode(result.text)) for result in results)
    return n_tokens / seconds, n_alone / alone_s


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    arguments = parser.parse_args()
    jobs = jobs_of(arguments.jobs)
    execute(jobs[:16], Path(tempfile.mkdtemp()) / "warm.jsonl", 2.0)  # jails and calibration
    with Pool() as pool:
        pool.judge_many([{"candidate": "x = 1", "tests": "assert x == 1"}] * 16)
        rounds = [
            (rate_of_execute(jobs), rate_of_pool(jobs, pool)) for _ in range(arguments.rounds)
        ]
    engine, problems = Engine(), problems_of(arguments.problems)
    generated = [
        rates_of_generation(engine, problems, arguments.n) for _ in range(arguments.rounds)
    ]
    result = {
        "execute_per_s": round(max(r[0] for r in rounds), 1),
        "pool_per_s": round(max(r[1] for r in rounds), 1),
        "ask_tokens_per_s": round(max(r[0] for r in generated)),
        "engine_tokens_per_s": round(max(r[1] for r in generated)),
    }
    result["execute_share"] = round(result["execute_per_s"] / result["pool_per_s"], 3)
    result["ask_share"] = round(result["ask_tokens_per_s"] / result["engine_tokens_per_s"], 3)
    if not arguments.json:
        for name, value in result.items():
            print(f"{name:24} {value:>10,}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
