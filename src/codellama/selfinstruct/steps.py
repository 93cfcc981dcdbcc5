"""The steps in order, each from the files of those before it to its own.

    mine      sources                  -> mined.jsonl          a row a package
    ask       the questions' model     -> batches.jsonl        a row a batch
    questions both, instruction sets   -> questions.jsonl, imported.jsonl
    tests     the tests' model         -> tests.jsonl          a row a question
    verify    mined functions          -> references.jsonl     a row a run
                                       -> problems.jsonl, held_out.jsonl
    solutions the solutions' model     -> solutions.jsonl      a row a sample
    execute   all tests                -> runs.jsonl           a row a run
    select    the first that passes    -> checks.jsonl         a row a run
                                       -> verified.jsonl, dialogs.jsonl

Files with a row for each thing done are appended to, keyed by ids: a step that was killed goes on.
The others follow from those before and are written whole. NAME.rejects.jsonl has what went, and
why.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codellama.data.decontaminate import build_block_list
from codellama.recipe import Recipe
from codellama.recipe_selfinstruct import SelfInstruct
from codellama.selfinstruct import questions, solutions, unit_tests
from codellama.selfinstruct.asking import Open, ask, open_role, turns
from codellama.selfinstruct.execute import Job, execute
from codellama.selfinstruct.lines import Row, appending, read_rows, write_rows
from codellama.selfinstruct.mine import mine
from codellama.selfinstruct.select import (
    check_jobs,
    checked,
    chosen,
    passed_tests,
    solution_jobs,
)
from codellama.tokenizer.chat import TAGS


@dataclass(frozen=True)
class Run:
    """Where the files are, and what the steps may use."""

    recipe: Recipe
    open_generator: Open = open_role
    ray: str | None = None
    """Address of a cluster to execute on."""
    say: Callable[[str], None] = lambda text: None

    @property
    def settings(self) -> SelfInstruct:
        """The recipe's section."""
        return self.recipe.selfinstruct

    @property
    def folder(self) -> Path:
        """Where all files are."""
        return self.recipe.work / self.settings.folder

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.folder / f"{name}.jsonl"

    def rows(self, name: str) -> list[Row]:
        """What a file holds so far."""
        return read_rows(self.path(name))

    def write(self, name: str, kept: Sequence[Row], rejects: Sequence[Row] = ()) -> None:
        """Write what stays and, where anything went, what went."""
        write_rows(self.path(name), kept)
        if rejects:
            write_rows(self.path(f"{name}.rejects"), rejects)
        self.say(f"{name}: {len(kept)} kept, {len(rejects)} rejected")

    def execute(self, name: str, jobs: Sequence[Job]) -> dict[str, Row]:
        """Run what was not run yet."""
        return execute(jobs, self.path(name), self.settings.timeout_s, self.ray, self.say)


def run_steps(run: Run, only: Sequence[str] = ()) -> None:
    """Do the named steps, or all; what was done before is not done again.

    Raises:
        ValueError: another process works in the folder, or settings differ from those of files.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with _only_process(run.folder), appending(run.path("timing")) as log:
        for name in only or STEPS:
            begin = time.perf_counter()
            STEPS[name](run)
            log({"step": name, "seconds": round(time.perf_counter() - begin, 1)})


def mine_sources(run: Run) -> None:
    """Look for problems in packages that were not looked at."""
    if run.settings.mine:
        done = {row["id"] for row in run.rows("mined")}
        with appending(run.path("mined")) as append:
            for row in mine(run.recipe.corpus, run.settings, run.recipe.work / "sources", done):
                append(row)
                if row["problems"]:
                    run.say(f"mined {row['id']}: {len(row['problems'])} problems")


def ask_questions(run: Run) -> None:
    """Let the model write batches of questions."""
    if role := run.settings.questions:
        prompts = questions.batches(role)
        ask(role, prompts, run.path("batches"), run.open_generator, 1, teller(run, "batches"))


def choose_questions(run: Run) -> None:
    """Drop questions that are malformed, there twice, alike, or in a benchmark."""
    corpus, settings = run.recipe.corpus, run.settings
    block_list = build_block_list(corpus.benchmarks) if corpus.benchmarks else None
    found = [problem for row in run.rows("mined") for problem in row["problems"]]
    dialogs: list[Row] = []
    for import_set in settings.imports:
        for row in questions.read_instructions(import_set.path):
            if import_set.use == "questions" and "reason" not in row:
                found.append(questions.as_question(row))
            else:
                dialogs.append(row)
    found += [item for row in run.rows("batches") for item in questions.read_batch(row)]
    run.write("questions", *questions.distinct(found, settings.near_duplicates, block_list))
    if dialogs:
        run.write("imported", *questions.distinct(dialogs, settings.near_duplicates, block_list))


def write_tests(run: Run) -> None:
    """Let the model write tests for the questions that have none."""
    if role := run.settings.tests:
        without = [row for row in run.rows("questions") if "tests" not in row]
        prompts = [(row["id"], unit_tests.prompt(role, row["question"])) for row in without]
        if prompts:
            tell = teller(run, "tests")
            ask(role, prompts, run.path("tests"), run.open_generator, role.n, tell)


def verify_references(run: Run) -> None:
    """Keep problems whose tests hold for the mined function and are not vacuous."""
    problems, rejects = _with_tests(run)
    known = [p for p in problems if p.get("reference")]
    waiting = [p for p in problems if not p.get("reference")]
    single = [j for p in known for j in solution_jobs(p, [p["reference"]], each_test=True)]
    runs = run.execute("references", single)
    verified: list[Row] = []
    for problem in known:
        [held] = passed_tests(problem, 1, runs)
        tests = [test for i, test in enumerate(problem["tests"]) if i in held]
        is_mined = problem["source"] == "mined"
        # Examples of a docstring may show what holds elsewhere; a test that was written for an
        # answer of unknown quality is not dropped for it.
        if len(tests) >= (run.settings.min_tests if is_mined else len(problem["tests"])):
            done = {"tests": tests, "verified": True, "solution": problem["reference"]}
            verified.append(problem | done)
        elif is_mined:
            statuses = {
                runs[f"{problem['id']}#0/{i}"]["status"] for i in range(len(problem["tests"]))
            }
            reason = f"the function itself: {min(statuses - {'passed'})}"
            rejects.append(problem | {"reason": reason})
        else:
            waiting.append(problem)
    jobs = {p["id"]: check_jobs(p, run.settings.n_mutants) for p in verified}
    runs = run.execute("references", [job for each in jobs.values() for job in each])
    after = [checked(p, jobs[p["id"]], runs) for p in verified]
    rejects += [p for p in after if "reason" in p]
    kept = [p for p in after if "reason" not in p]
    run.write("held_out", [p for p in kept if p.get("held_out")])
    run.write("problems", [*(p for p in kept if not p.get("held_out")), *waiting], rejects)


def _with_tests(run: Run) -> tuple[list[Row], list[Row]]:
    """Questions with their tests; of several answers with tests the first that can be read."""
    problems, rejects = [], []
    written: dict[str, list[Row]] = {}
    for row in run.rows("tests"):
        written.setdefault(row["task_id"], []).append(row)
    for row in run.rows("questions"):
        answers = [
            unit_tests.read_tests(answer["completion"], run.settings.min_tests)
            for answer in written.get(row["id"], [])
        ]
        usable = next((answer for answer in answers if "reason" not in answer), None)
        if "tests" in row or usable:
            problems.append(row | (usable or {}))
        else:
            rejects.append(row | (answers[0] if answers else {"reason": "no tests were asked for"}))
    return problems, rejects


def _asked_problems(run: Run) -> list[Row]:
    """Problems that solutions are asked for."""
    problems = run.rows("problems")
    if run.settings.max_problems:
        problems.sort(key=lambda p: questions.random_for("chosen", p["id"]).random())
    return problems[: run.settings.max_problems]


def write_solutions(run: Run) -> None:
    """Let the model write solutions, each with one test shown."""
    if role := run.settings.solutions:
        prompts = [(p["id"], solutions.prompt(role, p)) for p in _asked_problems(run)]
        if prompts:
            tell = teller(run, "solutions")
            ask(role, prompts, run.path("solutions"), run.open_generator, role.n, tell)


def _solutions(run: Run) -> Iterator[tuple[Row, list[str]]]:
    """Each problem with its solutions, in the order of their numbers."""
    role = run.settings.solutions
    found: dict[str, dict[int, str]] = {}
    for row in run.rows("solutions"):
        found.setdefault(row["task_id"], {})[row["sample"]] = row["completion"]
    for problem in run.rows("problems"):
        samples = found.get(problem["id"], {})
        texts = [samples[number] for number in sorted(samples)]
        style = role.style if role else "chat"
        yield problem, [solutions.solution_of(style, problem, text) for text in texts]


def execute_solutions(run: Run) -> None:
    """Run the tests of each problem on each of its solutions."""
    each_test = run.settings.consensus
    jobs = [job for p, texts in _solutions(run) for job in solution_jobs(p, texts, each_test)]
    run.execute("runs", jobs)


def select_solutions(run: Run) -> None:
    """Keep one solution a problem, check its tests, and write the dialogs to train on."""
    runs = {row["id"]: row for row in run.rows("runs")}
    rows = [chosen(p, texts, runs, run.settings) for p, texts in _solutions(run)]
    for row in rows:  # no dialog could be made of it
        if any(tag in row.get("solution", "") for tag in TAGS):
            row["reason"] = "a tag of the chat format"
    rejects = [row for row in rows if "reason" in row]
    kept = [row for row in rows if "reason" not in row]
    jobs = {
        row["id"]: check_jobs(row, run.settings.n_mutants)
        for row in kept
        if not row.get("verified")
    }
    checks = run.execute("checks", [job for each in jobs.values() for job in each])
    kept = [checked(r, jobs[r["id"]], checks) if r["id"] in jobs else r for r in kept]
    rejects += [row for row in kept if "reason" in row]
    kept = [row for row in kept if "reason" not in row]
    run.write("verified", kept, rejects)
    write_rows(
        run.path("dialogs"),
        [
            {"id": row["id"], "messages": turns(solutions.request(row), row["solution"].strip())}
            for row in kept
        ],
    )


STEPS: dict[str, Callable[[Run], Any]] = {
    "mine": mine_sources,
    "ask": ask_questions,
    "questions": choose_questions,
    "tests": write_tests,
    "verify": verify_references,
    "solutions": write_solutions,
    "execute": execute_solutions,
    "select": select_solutions,
}


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold the folder locked; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process works in this folder") from None
        yield
    finally:
        os.close(descriptor)


def teller(run: Run, what: str) -> Callable[[int, int], None]:
    """Says how many samples there are."""
    return lambda done, total: run.say(f"{what}: {done} of {total} samples")
