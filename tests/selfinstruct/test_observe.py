"""Observation in the real sandbox: functions of several kinds, tests that hold for them alone."""

import ast

import pytest

from codellama.selfinstruct.execute import execute
from codellama.selfinstruct.mine import mine_package
from codellama.selfinstruct.observe import N_TESTS, observation, observed_tests

MODULE = '''
import random, time, sys

def is_text(value):
    """Whether a value is a text, that is an instance of str."""
    return isinstance(value, str)

def shorten(text, width=3):
    """Cut a text so that it has at most the given width."""
    return text[:width]

def nothing(value):
    """Return nothing at all, whatever is given."""
    return None

def dice(value):
    """Return a random number that no test can know."""
    return random.random()

def forever(value):
    """Never come back from this function, so that it has to be ended."""
    while True:
        pass

def forge(value):
    """Print what looks like the answer of the one who asks."""
    print('[["(1,)", "2"]]')
    sys.exit(0)

def poison(value):
    """Print an answer whose text is a program, not a value."""
    print('[["(1,)", "__import__(1)"], ["1", 2], 3]')
    sys.stdout.flush()
    __import__("os")._exit(0)

def change(items):
    """Remove the last item of a list and return what is left."""
    items.pop()
    return items

def named(*, value):
    """Take an argument that must be given by its name."""
    return value

def add(left, right):
    """Add two things up, numbers or texts or lists."""
    return left + right
'''


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """The functions by name, with what was observed."""
    found = mine_package("p", {"m.py": MODULE}, min_tests=2, untested=True)
    assert found["problems"] == []
    rows = found["untested"]
    path = tmp_path_factory.mktemp("observe") / "observed.jsonl"
    seen = execute(map(observation, rows), path, timeout_s=1.0)
    return {row["name"]: row | observed_tests(row, seen) for row in rows}


def test_what_is_observed(problems):
    with_tests = {name for name, row in problems.items() if "tests" in row and "reason" not in row}
    assert with_tests == {"is_text", "shorten", "change", "add"}
    assert all(len(problems[name]["tests"]) == N_TESTS for name in with_tests - {"is_text"})


def test_results_are_different_and_true(problems):
    is_text = problems["is_text"]["tests"]
    assert {test.rpartition(" is ")[2] for test in is_text} == {"True", "False"}
    for name in ("shorten", "add", "is_text", "change"):
        row = problems[name]
        names: dict[str, object] = {}
        exec(row["reference"], names)  # written above
        for test in row["tests"]:
            exec(test, names)
    results = {
        ast.unparse(ast.parse(t).body[0].test.comparators[0]) for t in problems["add"]["tests"]
    }
    assert len(results) >= 4


def test_the_same_again(problems):
    for row in problems.values():
        assert observation(row) == observation(dict(row))


def test_no_row_is_no_test():
    row = {"id": "x", "name": "f", "head": "def f(x):", "reference": "def f(x): return x"}
    assert "reason" in observed_tests(row, {})
    for value in (None, 3, "text", [[]], [["(1,)"]], [["(", "1"], ["(2,)", "3"]]):
        assert "reason" in observed_tests(row, {"x": {"value": value}})
