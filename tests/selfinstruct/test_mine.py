"""Mining: what becomes a problem, on a made package and on the standard library itself."""

import sysconfig
from pathlib import Path

from codellama import sandbox
from codellama.selfinstruct.mine import describe, mine_package

MODULE = '''
from __future__ import annotations
import math, re
from collections import Counter as Bag, deque
import numpy as np
from . import sibling
try:
    import fast
except ImportError:
    fast = None

LIMIT = 3

def _clip(x):
    return min(x, LIMIT)

class Broken(Exception):
    pass

def clipped_root(x: int, *, factor=1) -> float:
    """The square root of a number, at most three.

    Args:
        x: not below zero

    >>> from math import pi
    >>> from package import clipped_root
    >>> import package
    >>> values = [4, 100]
    >>> [package.clipped_root(v) for v in values]
    [2.0, 3]
    >>> clipped_root(4) == 2
    True
    >>> clipped_root(-1)
    Traceback (most recent call last):
    Broken: below zero
    >>> clipped_root(unknown)
    2
    >>> clipped_root(9, factor=2)    # doctest: +ELLIPSIS
    <object ...>
    """
    if x < 0:
        raise Broken("below zero")
    return _clip(math.sqrt(x)) * factor  # a comment stays

def letters(text):
    """Count the letters of a text, however often they come."""
    return dict(Bag(re.findall("[a-z]", text)))

def matrix(n):
    """Make a matrix of ones with so many rows.

    >>> matrix(1)
    1
    >>> matrix(2)
    2
    """
    return np.ones(n)

def near(n):
    """Ask a sibling of this module for the answer.

    >>> near(1)
    1
    >>> near(2)
    2
    """
    return sibling.f(n)

def optional(n):
    """Do it fast where that can be done at all.

    >>> optional(1)
    1
    >>> optional(2)
    2
    """
    return fast(n)

def lonely(n):
    """A function with a single example, which is not enough.

    >>> lonely(1)
    1
    """
    return n
'''
TESTS = """
import unittest, package
from package import letters

class T(unittest.TestCase):
    def test(self):
        self.assertEqual(package.letters("aab"), {"a": 2, "b": 1})
        self.assertTrue(letters("").__len__() == 0, "a message")
        self.assertFalse(letters(""))
        self.assertEqual(letters(self.text), {})
        self.assertEqual(len(letters("abc")), package.clipped_root(9))

def test_plain(tmp_path):
    assert letters("z!") == {"z": 1}, "said"
"""


def mined(files):
    row = mine_package("package", files, min_tests=2)
    reasons = {task_id.rpartition(":")[2]: why for task_id, why in row["rejects"]}
    return {problem["name"]: problem for problem in row["problems"]}, reasons


def test_a_package():
    problems, reasons = mined({"m.py": MODULE, "tests/test_m.py": TESTS})
    assert reasons == {
        "matrix": "needs more than the standard library",
        "near": "needs more than the standard library",
        "optional": "needs a name that its module does not plainly define",
        "lonely": "fewer than 2 tests",
    }
    root, letters = problems["clipped_root"], problems["letters"]
    assert root["tests"] == [
        "values = [4, 100]\nassert [clipped_root(v) for v in values] == [2.0, 3]",
        "assert (clipped_root(4) == 2) is True",
    ]
    assert root["question"] == (
        "Write a Python function `clipped_root(x, *, factor=1)`.\n\n"
        "The square root of a number, at most three."
    )
    assert sorted(letters["tests"]) == [
        "assert letters('').__len__() == 0",
        "assert letters('aab') == {'a': 2, 'b': 1}",
        "assert letters('z!') == {'z': 1}",
        "assert not letters('')",
    ]
    assert letters["head"].startswith("from collections import Counter as Bag\nimport re\ndef ")
    assert "deque" not in letters["reference"]
    assert "# a comment stays" in root["reference"]
    assert '"""' not in root["reference"]
    for problem in problems.values():
        for test in problem["tests"]:
            assert sandbox.judge(problem["reference"], test).passed, test


def test_the_standard_library_passes_its_own_examples():
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("statistics", "textwrap", "heapq", "difflib", "colorsys", "shlex", "keyword", "html")
    paths = [path for name in names if (path := folder / f"{name}.py").exists()]
    problems, _ = mined({path.name: path.read_text(encoding="utf-8") for path in paths})
    assert len(problems) >= 8
    passed = {
        name
        for name, problem in problems.items()
        if sandbox.judge(problem["reference"], "\n".join(problem["tests"])).passed
    }
    assert len(passed) >= 0.7 * len(problems), problems.keys() - passed


def test_describe_ends_where_sections_begin():
    assert describe("What it does.\n\nMore.\n\nParameters\n----------\nx : int") == (
        "What it does.\n\nMore."
    )
    assert describe("What.\n\n:param x: it") == "What."
    assert describe("Example of a word in a sentence.\n\nExamples:\n\n>>> 1") == (
        "Example of a word in a sentence."
    )
    assert len(describe("A sentence of words. " * 100)) <= 600
