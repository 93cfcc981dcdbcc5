"""The whole tree of stages of the tiny recipe, at a size that takes a minute."""

import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from codellama.cli import app
from codellama.weights import load

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("start", "gaps", "code", "base", "instruct", "python", "python-long")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The command, over a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("cascade")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")):
        (folder / "modules").mkdir(exist_ok=True)
        shutil.copy(path, folder / "modules")
    overrides = [
        f'work="{folder / "work"}"',
        f'corpus.sources=[{{name="modules", path="{folder / "modules"}", licence="PSF-2.0"}}]',
        "corpus.hold_out=[]",
        "corpus.validation_share=0.1",
        "corpus.filters.permissive_only=false",
        f'collections.dialogs.dialogs="{ROOT / "recipes/dialogs/hand_made.jsonl"}"',
        "tokenizer.vocab_size=600",
        "model.overrides={vocab_size=604, hidden_size=64, intermediate_size=128}",
    ]
    for stage in STAGES:
        seq_len = 256 if stage in ("base", "python-long") else 128
        values = {"seq_len": seq_len, "batch_tokens": 512, "micro_batch": 2, "steps": 3}
        values |= {"compile": "false", "validation_tokens": 1024, "warmup_steps": 0}
        overrides += [f"stages.{stage}.{key}={value}" for key, value in values.items()]
    command = ["run", str(ROOT / "recipes/tiny.toml")]
    return folder, command + [part for value in overrides for part in ("--set", value)]


def test_the_whole_tree(arguments):
    folder, command = arguments
    runs = folder / "work" / "runs"
    first = CliRunner().invoke(app, [*command, "--only", "start"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert sorted(path.name for path in runs.iterdir()) == ["start"]
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout.splitlines()[-1])
    assert sorted(row["stage"] for row in table) == sorted(STAGES)
    assert all(row["step"] == "3 of 3" for row in table)
    # All the held-out files are Python, so there is nothing to say of other kinds.
    assert all(re.fullmatch(r"all (\S+)  python \1", row["bits a byte"]) for row in table)
    # A stage changes what the recipe says, and nothing else.
    models = {stage: load(runs / stage / "checkpoint") for stage in STAGES}
    bases = {stage: model.config.rope_theta for stage, (model, _) in models.items()}
    short, long = ("start", "gaps", "code", "python"), ("base", "instruct", "python-long")
    assert bases == dict.fromkeys(short, 1e4) | dict.fromkeys(long, 1e6)
    contexts = {stage: m.config.max_position_embeddings for stage, (m, _) in models.items()}
    assert contexts == dict.fromkeys(short, 128) | dict.fromkeys(long, 256)
    formats = {stage: tokenizer.chat_format for stage, (_, tokenizer) in models.items()}
    assert formats == dict.fromkeys(STAGES) | {"instruct": "inst"}
    report = json.loads((runs / "instruct" / "mixture.json").read_text())
    assert {row["collection"] for row in report} == {"collection 'dialogs'", "collection 'corpus'"}


def test_what_is_done_is_skipped(arguments):
    _, command = arguments
    result = CliRunner().invoke(app, [*command, "--from", "python"], catch_exceptions=False)
    assert result.exit_code == 0
    text = result.output + result.stderr
    assert "python/checkpoint: already trained" in text
    assert "python-long/checkpoint: already trained" in text
    assert "code/checkpoint: already" not in text


@pytest.mark.parametrize("option", ["--only", "--from"])
def test_stages_that_do_not_exist(arguments, option):
    _, command = arguments
    result = CliRunner().invoke(app, [*command, option, "nothing"])
    assert result.exit_code == 2
    assert "no stage 'nothing'" in result.output + result.stderr
