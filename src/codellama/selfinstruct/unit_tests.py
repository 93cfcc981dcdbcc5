"""Unit tests that a model writes for a question, in the form of the paper's figure 11.

The answer is parsed strictly: asserts between the markers, all about one function, each complete
in itself. What is anything else is rejected with its reason; nothing is mended.
"""

from __future__ import annotations

import ast

from codellama.eval.task import Prompt
from codellama.recipe_selfinstruct import TestWriter
from codellama.rows import Row
from codellama.selfinstruct.asking import as_prompt
from codellama.selfinstruct.python import free_names, parse, unparse
from codellama.tokenizer.chat import TAGS

EXAMPLE_PROBLEM = "Return the unique elements of a list, in the order of their first appearance."
EXAMPLE_TESTS = (  # the paper's example is of the same problem
    "assert get_unique_elements([]) == []",
    "assert get_unique_elements([1]) == [1]",
    "assert get_unique_elements([1, 2, 3, 2, 1]) == [1, 2, 3]",
)


def prompt(role: TestWriter, question: str) -> Prompt:
    """One worked example, and the question."""
    numbered = enumerate(EXAMPLE_TESTS, start=1)
    shown = "\n".join(f"# Test case {n}:\n{test}" for n, test in numbered)
    task = f"{role.prompt}\n\nProblem: {EXAMPLE_PROBLEM}"
    return as_prompt(role, task, f"[TESTS]\n{shown}\n[/TESTS]", f"Problem: {question}")


def read_tests(text: str, min_tests: int) -> Row:
    """`name` of the function and `tests`, or the `reason` why there are none."""
    _, begin, rest = text.partition("[TESTS]")
    body, end, _ = rest.partition("[/TESTS]")
    if not begin or not end:
        return {"reason": "no markers"}
    tree = parse(body.strip())
    if tree is None:
        return {"reason": "not Python"}
    if not all(isinstance(node, ast.Assert) for node in tree.body):
        return {"reason": "not only asserts"}
    tests = list(dict.fromkeys(filter(None, map(unparse, tree.body))))
    if len(tests) < min_tests:
        return {"reason": f"fewer than {min_tests} tests"}
    if any(tag in test for test in tests for tag in TAGS):
        return {"reason": "a tag of the chat format"}
    needed = [free_names(node) for node in tree.body]
    names = set().union(*needed)
    if len(names) != 1 or not all(needed):
        return {"reason": "not about one function"}
    return {"name": names.pop(), "tests": tests}
