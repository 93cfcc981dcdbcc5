"""Sampling into a file: seeds, resuming after a kill, settings, long prompts."""

import json

import pytest
from scripted import Scripted, Sums

from codellama.engine import Engine
from codellama.engine.sequence import Completion
from codellama.eval import sampling
from codellama.eval.sampling import TOO_LONG, Decoding, fingerprint, sample
from codellama.eval.task import Problem, Prompt, Setting
from codellama.eval.tasks.context import BitsPerByte

SAMPLED = Decoding(n=4, temperature=0.8, top_p=0.95, seed=1)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_sample_has_its_own_seed(tmp_path):
    path = tmp_path / "run" / "samples.jsonl"
    settings = sample(Scripted(), Sums(), path, SAMPLED, {"name": "m"})
    found = rows(path)
    assert len(found) == 12
    assert len({row["completion"] for row in found}) == 12
    assert settings["temperature"] == 0.8
    again = tmp_path / "again.jsonl"
    sample(Scripted(), Sums(), again, SAMPLED, {"name": "m"})
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("n_bytes", [0, 1, 60, 200, 431])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, n_bytes):
    whole, cut_off = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    monkeypatch.setattr(sampling, "CHUNK", 5)
    sample(Scripted(), Sums(), whole, SAMPLED, {})
    sample(Scripted(), Sums(), cut_off, SAMPLED, {})
    cut_off.write_bytes(whole.read_bytes()[:n_bytes])
    generator = Scripted()
    sample(generator, Sums(), cut_off, SAMPLED, {})
    assert cut_off.read_bytes() == whole.read_bytes()
    assert len(generator.asked) == 12 - whole.read_bytes()[:n_bytes].count(b"\n")
    sample(done := Scripted(), Sums(), cut_off, SAMPLED, {})
    assert done.calls == 0


def test_rows_are_written_in_order_as_soon_as_they_can_be(tmp_path):
    """Answers end in any order; a file never has a gap, and a kill loses what waits for one."""
    path, lengths = tmp_path / "samples.jsonl", []

    class Uneven(Scripted):
        def complete(self, prompts, params, on_end):
            def note(number, results):
                on_end(number, results)
                lengths.append(len(rows(path)))

            for number in (1, 2, 0, 3, *range(11, 3, -1)):
                note(number, [Completion(self.answer("", params[number]), (), None, "stop")])

    told = []
    sample(Uneven(), Sums(), path, SAMPLED, {}, progress=lambda *n: told.append(n))
    sample(Scripted(), Sums(), tmp_path / "even.jsonl", SAMPLED, {})
    assert path.read_bytes() == (tmp_path / "even.jsonl").read_bytes()
    assert lengths == [0, 0, 3, 4] + 7 * [4] + [12]
    assert told == [(n, 12) for n in range(1, 13)]


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample(Scripted(), Sums(), path, SAMPLED, {"sha256": "a"})
    with pytest.raises(ValueError, match="made with model = "):
        sample(Scripted(), Sums(), path, SAMPLED, {"sha256": "b"})
    with pytest.raises(ValueError, match="made with seed = 1, now 2"):
        sample(Scripted(), Sums(), path, Decoding(4, 0.8, 0.95, 2), {"sha256": "a"})


def test_equal_samples_are_refused():
    with pytest.raises(ValueError, match="temperature 0 gives equal samples"):
        Decoding(n=2)
    assert Decoding.of(Sums(), 1).temperature == 0
    assert (Decoding.of(Sums(), 9).temperature, Decoding.of(Sums(), 9).top_p) == (0.8, 0.95)


class Long(Sums):
    """One prompt fits the context, one does not."""

    may_lose_start = False

    def load(self):
        return [Problem("short", {}), Problem("long", {})]

    def prompt(self, problem):
        text = "x = 1\n" * (3 if problem.task_id == "short" else 2000)
        return Prompt(text, may_lose_start=self.may_lose_start, max_tokens=3)


def test_a_long_prompt_is_cut_or_said(tmp_path):
    engine = Engine()
    sample(engine, Long(), tmp_path / "a.jsonl", Decoding(), {})
    assert [row["finish_reason"] == TOO_LONG for row in rows(tmp_path / "a.jsonl")] == [False, True]
    task = Long()
    task.may_lose_start = True
    sample(engine, task, tmp_path / "b.jsonl", Decoding(), {})
    short, long = rows(tmp_path / "b.jsonl")
    assert TOO_LONG not in (short["finish_reason"], long["finish_reason"])
    assert long["completion"].strip()


def test_likelihood_is_that_of_the_whole_text(tmp_path):
    """Bits per byte through the file equals a direct computation."""
    import math

    text = "def f(x):\n    return x\n"
    file = tmp_path / "data" / "f.py"
    file.parent.mkdir()
    file.write_text(text)
    engine, task = Engine(dtype="float32"), BitsPerByte(Setting(file.parent))
    sample(engine, task, tmp_path / "s.jsonl", Decoding(), {})
    verdict = task.check(task.problems()[0], rows(tmp_path / "s.jsonl")[0]["completion"])
    ids = engine.tokenizer.encode(text, bos=True)
    total = -sum(engine.score([ids])[0]) / math.log(2)
    assert verdict.values["bits_per_byte"] == pytest.approx(total / len(text), abs=1e-5)
    assert verdict.weight == len(text)


def test_a_new_card_makes_no_new_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("what was measured since")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert fingerprint(tmp_path) != before
