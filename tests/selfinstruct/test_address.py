"""All steps through an address: the same files and report as with the model in this process."""

import asyncio
import time
from pathlib import Path

import pytest
import torch
from scripted_roles import write_recipe

from codellama.engine import Engine
from codellama.engine.endpoint import Endpoint
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer
from codellama.recipe import load_recipe
from codellama.selfinstruct.report import report
from codellama.selfinstruct.steps import Run, run_steps
from codellama.serve import Service, create_app

SAMPLED = ("batches", "tests", "solutions")
FOLLOWING = ("mined", "questions", "imported", "problems", "held_out", "verified", "dialogs")
ASKED = """
{"instruction": "Write a function that counts the vowels of a text.", "output": "I do not know."}
{"instruction": "Return the middle item of a sorted list of numbers.", "output": "items[1]"}
"""


@pytest.fixture(scope="module")
def engine(small_tokenizer):
    """A small random model, which answers with anything."""
    config = ModelConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_position_embeddings=2048)
    # A wide initialisation: confident, varied predictions, far from ties.
    model = Transformer(config.replace(initializer_range=0.4))
    model.initialise(torch.Generator().manual_seed(3))
    model = model.eval().requires_grad_(False)
    return Engine.of(model, small_tokenizer.with_chat_format("inst"))


def run_of(folder, *overrides):
    """The scripted recipe's steps, with questions of a file and answers of a few tokens."""
    folder.mkdir()
    (folder / "asked.jsonl").write_text(ASKED.strip() + "\n")
    settings = [
        f'selfinstruct.imports=[{{path="{folder}/asked.jsonl", use="questions"}}]',
        "selfinstruct.questions.max_tokens=60",
        "selfinstruct.tests.max_tokens=40",
        "selfinstruct.solutions.max_tokens=24",
        "selfinstruct.solutions.n=3",
    ]
    return load_recipe(write_recipe(folder), [*settings, *overrides])


def test_all_steps_through_an_address(engine, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engine")
    from faulty_server import listening

    here = Run(run_of(tmp_path / "here"), lambda role: engine)
    run_steps(here)
    with listening(create_app(lambda: Service(engine, engine.tokenizer, "m", {}))) as url:
        while asyncio.run(Endpoint(url).check())[url + "/v1"]:  # the model is not there yet
            time.sleep(0.01)
        roles = [f'selfinstruct.{role}.model=["{url}/v1"]' for role in ("questions", "tests")]
        roles += [f'selfinstruct.solutions.model=["{url}/v1", "{url}"]']
        there = Run(run_of(tmp_path / "there", *roles))  # opens them itself
        run_steps(there)
    for name in SAMPLED:
        assert len(here.rows(name)) >= 1
        assert len({row["completion"] for row in here.rows(name)} - {""}) >= 1, name
    for name in (*SAMPLED, *FOLLOWING, *(f"{name}.rejects" for name in FOLLOWING[1:-1])):
        text = here.path(name).read_text().replace(str(tmp_path / "here"), str(tmp_path / "there"))
        assert there.path(name).read_text() == text, name
    assert len(here.rows("verified")) == 2  # the mined functions, for no sample passes
    tables = [report(run) for run in (here, there)]
    for part in ("funnel", "rejects", "verdicts", "difficulty", "tests", "diversity"):
        assert tables[0][part] == tables[1][part]
