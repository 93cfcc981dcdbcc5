"""The model in the package: small enough, quick to load, and able to do what the README says."""

import re
import subprocess
import sys

import pytest

from codellama import Engine, SamplingParams, demo
from codellama.engine.engine import SHIPPED_MODEL

PERSON = "class Person:\n    def __init__(self, name, age):\n"


@pytest.fixture(scope="module")
def engine():
    return Engine()


def test_it_fits_the_package_and_has_a_card():
    n_bytes = sum(file.stat().st_size for file in SHIPPED_MODEL.iterdir())
    assert n_bytes <= 64_000_000
    card = (SHIPPED_MODEL / "README.md").read_text(encoding="utf-8")
    for heading in ("## Data", "## Training", "## Measured", "## Samples", "## Limits"):
        assert heading in card


def test_it_loads_in_less_than_a_second_and_a_half_of_work():
    """Processor time, which other processes do not change much."""
    program = (
        "import time, torch\n"
        "from codellama.engine import Engine\n"
        "begin = time.process_time()\n"
        "Engine()\n"
        "print(time.process_time() - begin)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert float(done.stdout) < 1.5, done.stderr


@pytest.mark.parametrize("prompt", [PERSON, "def __init__(self, name, age):\n"])
def test_it_assigns_the_arguments_of_init(engine, prompt):
    result = engine.complete([prompt], SamplingParams(max_tokens=48))[0]
    assert "self.name = name" in result.text
    assert "self.age = age" in result.text


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("import os\n\npath = os.path.join(os.path.dirname(__file__", r"\)"),
        ("if not isinstance(value, (int, float", r"\)"),
        ("def add(self, other", r"(: \w+)?(, \*+\w+(: \w+)?)*\)"),
    ],
)
def test_it_closes_brackets(engine, opened, closed):
    """What it writes on the line closes all that are open, and not one more."""
    result = engine.complete([opened], SamplingParams(max_tokens=12))[0]
    line = opened + result.text.splitlines()[0]
    assert line.count("(") == line.count(")")
    assert re.match(closed, result.text)  # at once, but for types and further parameters


@pytest.mark.parametrize(
    ("prefix", "suffix", "middle"),
    [
        (PERSON + "        self.name = ", "\n        self.age = age\n", "name"),
        (
            'def add(a, b):\n    """Return the sum of a and b."""\n',
            '\n\n\ndef sub(a, b):\n    """Return the difference of a and b."""\n    return a - b\n',
            "    return a + b",
        ),
    ],
)
def test_it_fills_a_gap_and_ends_there(engine, prefix, suffix, middle):
    result = engine.infill([(prefix, suffix)], SamplingParams(max_tokens=24))[0]
    assert result.text == middle
    assert result.finish_reason == "stop"


def test_it_agrees_with_transformers(engine):
    transformers = pytest.importorskip("transformers")
    import torch

    theirs = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    ours = Engine(dtype="float32")
    inputs = tokenizer(PERSON, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ours.tokenizer.encode(PERSON, bos=True)
    ids = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    result = ours.complete([PERSON], SamplingParams(max_tokens=40))[0]
    assert list(result.token_ids) == ids[inputs["input_ids"].shape[1] :].tolist()


def test_the_demonstration_shows_what_it_can_do(engine, capsys):
    demo.show(engine)
    shown = capsys.readouterr().out
    assert "        self.name = name\n        self.age = age" in shown
    assert '"""Return the sum of a and b."""\n    return a + b\n\n\ndef sub' in shown
    assert "tokens per second" in shown
