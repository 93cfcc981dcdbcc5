"""The whole pipeline on a scripted model: what is kept, what goes and why, and after kills."""

import csv
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest
from scripted_roles import Model, main, write_recipe

from codellama import sandbox
from codellama.cli import run_command
from codellama.data.mixture import Dialogs
from codellama.engine.sequence import Completion
from codellama.eval.scoring import check_references
from codellama.eval.task import Setting
from codellama.recipe import load_recipe
from codellama.recipe_selfinstruct import SolutionWriter
from codellama.rows import read_rows
from codellama.selfinstruct.asking import open_role
from codellama.selfinstruct.measure import measure
from codellama.selfinstruct.report import markdown, report
from codellama.selfinstruct.solutions import HeldOut
from codellama.selfinstruct.steps import Run, run_steps

WHOLE = ("questions", "problems", "held_out", "verified", "dialogs")
SAMPLES = ("batches", "tests", "solutions")
RUNS = ("observed", "references", "runs", "checks")
KILLED_IN = ("mined", "observed", "batches", "questions", "tests", "references", "problems",
             "solutions", "runs", "checks", "verified")  # fmt: skip
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selfinstruct")
    run = Run(load_recipe(write_recipe(folder)), lambda role: Model())
    run_steps(run)
    return run


def reasons(run, name):
    return {row["id"]: row["reason"] for row in run.rows(f"{name}.rejects")}


def test_questions_that_are_dropped_say_why(done):
    kinds = [reason.split(" ")[0] for _, reason in sorted(reasons(done, "questions").items())]
    # duplicate, tag, too short, cut off, and one near duplicate
    assert sorted(kinds) == ["a", "cut", "duplicate", "like", "not"]
    assert len(done.rows("questions")) == 3 + 13 - 5


def test_tests_that_cannot_be_read_say_why(done):
    found = Counter(reasons(done, "problems").values())
    assert found == {"no markers": 2, "not only asserts": 1}


def test_what_passes_is_kept_with_the_first_solution(done):
    verified = {row["name"]: row for row in done.rows("verified")}
    assert verified.keys() == {"add", "largest", "celsius", "double", "louder"}
    # Not the forgers, the loop, the flood, or the one that was made for one test.
    assert verified["add"]["by"] == 6
    assert verified["add"]["pass_rate"] == 2 / 8
    assert verified["largest"]["solution"] == "largest = max\n"
    assert verified["double"]["by"] == 0
    assert verified["double"]["package"] == "near"
    assert verified["louder"]["source"] == "observed"
    assert all("!" in test for test in verified["louder"]["tests"])
    for row in verified.values():
        assert row["n_killed"] >= 1
        outcome = sandbox.judge(row["solution"], row["tests"])
        assert outcome.passed
        assert not sandbox.judge(f"def {row['name']}(*_):\n    return None", row["tests"]).passed


def test_hostile_and_vacuous_problems_are_counted_by_verdict(done):
    assert sorted(reasons(done, "verified").values()) == [
        "no solution passed",
        "the tests accept a stub",
    ]
    statuses = {row["id"].rpartition("/")[2]: row["status"] for row in done.rows("runs")}
    add = [statuses[f"0#{i}"] for i in range(8)]
    assert add[:2] == ["failed", "failed"]
    assert add[2] == "timeout"
    assert add[3] in ("output", "timeout")  # whichever limit comes first
    assert add[4:6] == ["failed", "failed"]
    assert "passed" not in {row["status"] for row in done.rows("runs") if "/10#" in row["id"]}


def test_held_out_problems_are_nowhere_else(done):
    [problem] = done.rows("held_out")
    assert problem["package"] == "apart"
    for name in ("problems", "solutions", "verified", "dialogs"):
        assert "apart" not in done.path(name).read_text()


def test_dialogs_are_what_training_reads(done):
    dialogs = Dialogs(done.path("dialogs"))
    assert len(dialogs) == 5
    assert [m["role"] for m in json.loads(dialogs.text(0))] == ["user", "assistant"]


def test_report(done):
    result = report(done)
    funnel = result["funnel"]
    assert funnel["functions observed"] == 1
    assert funnel["questions collected"] == 3 + 13 - 3  # not those that are malformed
    assert funnel["questions that differ"] == 3 + 13 - 5
    assert funnel["problems with a solution that passes"] == 5
    assert funnel["of them by the model"] == 5
    assert funnel["solutions written"] == 8 * 7
    assert funnel["not judged, for the sandbox failed"] == 0
    assert funnel["programs executed"] == sum(sum(v.values()) for v in result["verdicts"].values())
    text = markdown(result)
    assert "| problems with a solution that passes | 5 |" in text
    assert result["verdicts"]["runs"]["passed"] >= 2 + 8 + 8 + 8
    assert json.loads((done.folder / "report.json").read_text()) == result


def test_the_sandboxs_own_failures_void_the_report(done, tmp_path):
    run = Run(load_recipe(write_recipe(tmp_path)))
    copy_files(done, run)
    rows = run.rows("runs")
    rows[0]["status"] = "error"
    run.path("runs").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="the sandbox failed in 1 of"):
        report(run)
    run_steps(run, ["execute"])  # it is run again
    assert report(run)["funnel"]["not judged, for the sandbox failed"] == 0


def test_a_second_run_asks_and_executes_nothing(done):
    before = {path.name: path.read_bytes() for path in done.folder.glob("*.jsonl")}
    model = Model()
    run_steps(Run(done.recipe, lambda role: model))
    assert model.asked == 0
    for path in done.folder.glob("*.jsonl"):
        if path.stem != "timing":
            assert path.read_bytes() == before[path.name], path.name


def test_other_settings_are_refused(done):
    recipe = load_recipe(
        done.recipe.work.parent / "recipe.toml",
        ["selfinstruct.solutions.n=9", "selfinstruct.solutions.temperature=0.2"],
    )
    with pytest.raises(ValueError, match=r"solutions\.jsonl|settings"):
        run_steps(Run(recipe, lambda role: Model()), ["solutions"])


def test_consensus_keeps_a_solution_that_others_agree_with(done, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["selfinstruct.consensus=true"])
    run = Run(recipe)
    copy_files(done, run)
    run_steps(run, ["execute", "select"])
    verified = {row["name"]: row for row in run.rows("verified")}
    assert verified["add"]["by"] == 6
    assert verified.keys() >= {"add", "celsius"}


def test_a_round_of_rejection_sampling_asks_the_problems_of_another_again(done, tmp_path):
    """As the dialogs ask; several solutions of a problem are kept, where they differ."""
    before = {path.name: path.read_bytes() for path in done.folder.glob("*.jsonl")}
    asked = []

    class Tuned(Model):
        def chat(self, dialogs, params, on_end):
            asked.extend(message["content"] for [message] in dialogs)
            super().chat(dialogs, params, on_end)

    recipe = write_recipe(tmp_path)
    again = [
        f"selfinstruct.problems_of={str(done.folder)!r}",
        "selfinstruct.references=false",
        "selfinstruct.keep=3",
        "selfinstruct.max_problems=3",
        "selfinstruct.short_first=true",
        "selfinstruct.solutions.style=request",
    ]
    run = Run(load_recipe(recipe, again), lambda role: Tuned())
    run_steps(run)
    assert {path.name: path.read_bytes() for path in done.folder.glob("*.jsonl")} == before
    assert sorted(path.stem for path in run.folder.glob("*.jsonl")) == sorted(
        ("solutions", "runs", "checks", "verified", "verified.rejects", "dialogs", "timing")
    )
    wanted = {
        row["id"]: len(row.get("reference") or row["question"]) for row in run.rows("problems")
    }
    chosen = {row["task_id"] for row in run.rows("solutions")}
    assert max(wanted[i] for i in chosen) <= min(wanted[i] for i in wanted.keys() - chosen)
    kept = {row["name"]: row for row in run.rows("verified")}
    assert all(row["by"] != "reference" for row in kept.values())
    dialogs = [row["messages"] for row in run.rows("dialogs")]
    assert {messages[0]["content"] for messages in dialogs} <= set(asked)
    assert len(dialogs) == report(run)["funnel"]["dialogs"]
    assert report(run)["funnel"]["problems held out"] == 1
    with pytest.raises(ValueError, match="mine: the problems of this round are those of"):
        run_steps(run, ["mine"])
    nowhere = [f"selfinstruct.problems_of={str(tmp_path / 'nowhere')!r}"]
    with pytest.raises(ValueError, match=r"nowhere/problems\.jsonl: no problems"):
        run_steps(Run(load_recipe(recipe, nowhere)))


def copy_files(one, other):
    other.folder.mkdir(parents=True)
    for path in one.folder.glob("*.jsonl*"):
        (other.folder / path.name).write_bytes(path.read_bytes())


def test_killed_in_each_step_it_goes_on_as_if_it_had_not_been(done, tmp_path):
    """kill -9 as soon as a step's file grows, with a torn line behind; then the next."""
    recipe = write_recipe(tmp_path)
    folder = tmp_path / "work" / "selfinstruct"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripted_roles"])
    n_killed = 0
    for name in KILLED_IN:
        path = folder / f"{name}.jsonl"
        size = path.stat().st_size if path.exists() else 0
        child = context.Process(target=main, args=(str(recipe),))
        child.start()
        while child.is_alive() and (not path.exists() or path.stat().st_size <= size):
            time.sleep(0.005)
        if child.is_alive() and child.pid:
            os.kill(child.pid, signal.SIGKILL)
            n_killed += 1
        child.join()
        if name not in WHOLE:
            whole = path.read_bytes()
            assert whole.count(b"\n") >= 1
            path.write_bytes(whole + b'{"id": "torn", "status": "pas')
    assert n_killed >= len(KILLED_IN) - 1  # of the last step little is left behind its file
    run = Run(load_recipe(recipe), lambda role: Model())
    run_steps(run)
    assert_same_files(run, done)


def assert_same_files(run, done):
    """Every row of all steps is there, and none twice; programs are compared by their ids."""
    for name in ("mined", *WHOLE, *SAMPLES):
        text = done.path(name).read_text()
        text = text.replace(str(done.recipe.work.parent), str(run.recipe.work.parent))
        assert run.rows(name) == [json.loads(line) for line in text.splitlines()], name
    for name in RUNS:
        ids = [(row["id"], row["sha256"]) for row in read_rows(run.path(name))]
        assert ids == [(row["id"], row["sha256"]) for row in done.rows(name)], name


def test_roles_are_models_or_addresses():
    addresses = ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    assert type(open_role(SolutionWriter(model=addresses))).__name__ == "Endpoint"
    with pytest.raises(ValueError, match="several must all be http"):
        open_role(SolutionWriter(model=(*addresses, "folder")))


def test_the_command_says_which_steps_there_are(done, capsys):
    recipe = str(done.recipe.work.parent / "recipe.toml")
    assert run_command(["selfinstruct", recipe, "--step", "wrong"]) == 2
    assert "mine, observe, ask, questions" in capsys.readouterr().err
    assert run_command(["selfinstruct", recipe, "--step", "select", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["funnel"]["problems held out"] == 1


def test_measuring_counts_what_passes_all_tests(done):
    class Half:
        """Answers rightly every second time."""

        def chat(self, dialogs, params, on_end):
            texts = ["def double(x):\n    return x * 2", "def double(x):\n    return 4"]
            for i in range(len(dialogs)):
                on_end(i, [Completion(texts[i % 2], (), None, "stop")])

    [result] = [r for r in measure(done, done.folder, Half(), True, 10) if r["task"] == "held-out"]
    assert result["metrics"]["pass@1"]["value"] == 0.5
    assert result["metrics"]["pass@10"]["value"] == 1.0
    task = HeldOut(done.rows("held_out"), Setting(), 2.0)
    assert check_references(task)["n_passed"] == 1


def test_refusals_are_measured_and_reported(done, shared_data, tmp_path, monkeypatch):
    """A model that refuses by a word: the shares are those of the prompts with it."""

    class Timid:
        def chat(self, dialogs, params, on_end):
            for i, dialog in enumerate(dialogs):
                text = "I can't help" if "kill" in dialog[-1]["content"] else "Yes."
                on_end(i, [Completion(text, (), None, "stop")])

    monkeypatch.setenv("CODELLAMA_DATA", str(shared_data))
    run = Run(load_recipe(write_recipe(tmp_path)))
    copy_files(done, run)
    assert report(run)["measured"] == {}
    measure(run, tmp_path / "tree", Timid(), True, 1)
    with (shared_data / "xstest" / "xstest_prompts.csv").open(newline="") as file:
        prompts = [(row["label"], "kill" in row["prompt"]) for row in csv.DictReader(file)]
    shares = {
        label: round(fmean(kills for of, kills in prompts if of == label), 3)
        for label in ("safe", "unsafe")
    }
    result = report(run)
    found = result["measured"]["tree-chat, xstest"]
    assert (found["refused safe"], found["refused unsafe"]) == (shares["safe"], shares["unsafe"])
    assert result["measured"]["tree-chat, held-out"]["pass@1"] == 0.0
    assert f"refused safe {shares['safe']}" in markdown(result)


def test_the_shipped_recipe_measures_on_what_its_base_never_saw():
    """Held out are packages that `tiny` holds out or lacks; hashes and rehearsal add none."""
    base, ours = load_recipe(RECIPES / "tiny.toml"), load_recipe(RECIPES / "selfinstruct.toml")
    named = {name.partition("==")[0] for s in base.corpus.sources for name in s.packages}
    held_out = set(ours.selfinstruct.hold_out)
    assert held_out <= set(ours.corpus.hold_out)
    assert not (held_out & named) - set(base.corpus.hold_out)
    assert ours.selfinstruct.hold_out_share == ours.corpus.validation_share == 0.0


def test_dialogs_of_the_recipe_are_not_those_that_measure_it(shared_data):
    text = (shared_data / "xstest" / "xstest_prompts.csv").read_text().lower()
    asked = [
        json.loads(line)["messages"][0]["content"]
        for name in ("harmless", "refusals")
        for line in (RECIPES / "dialogs" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(set(asked)) == len(asked) > 50
    assert not [each for each in asked if each.lower().rstrip("?.") in text]


@pytest.mark.slow
def test_killed_at_twenty_moments_it_gives_the_same_files(done, tmp_path):
    """Goal P2: in which step a kill falls is chance; a run that reaches its end begins again."""
    rng = random.Random(2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripted_roles"])
    n_killed = n_done = 0
    while n_killed < 20 or not n_done:
        folder = tmp_path / str(n_done)
        folder.mkdir(exist_ok=True)
        recipe = write_recipe(folder)
        child = context.Process(target=main, args=(str(recipe),))
        child.start()
        child.join(None if n_killed >= 20 else rng.uniform(0.3, 6.0))
        if child.is_alive() and child.pid:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            n_killed += 1
            continue
        assert child.exitcode == 0
        run = Run(load_recipe(recipe), lambda role: Model())
        assert_same_files(run, done)
        n_done += 1
