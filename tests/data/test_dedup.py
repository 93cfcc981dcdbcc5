import random

import daft
import pytest
from trees import program

from codellama.data.dedup import mark_duplicates, normalised_key


@pytest.mark.parametrize(
    "same",
    [
        "def f():\r\n    return 1\r\n",
        "def f():\n    return 1",
        "def f():   \n\n    return 1\t\n\n\n",
    ],
)
def test_layout_that_means_nothing_is_ignored(same: str) -> None:
    assert normalised_key(same) == normalised_key("def f():\n    return 1\n")


@pytest.mark.parametrize(
    "other", ["def f():\n  return 1\n", "def f():\n    return 2\n", "def F():\n    return 1\n"]
)
def test_what_changes_the_program_is_not_ignored(other: str) -> None:
    assert normalised_key(other) != normalised_key("def f():\n    return 1\n")


def test_lines_are_kept_apart() -> None:
    assert normalised_key("ab\nc\n") != normalised_key("a\nbc\n")


def test_marks_exactly_what_brute_force_marks() -> None:
    rng = random.Random(1)
    keys = [normalised_key(program(f"p{rng.randrange(40)}")) for _ in range(300)]
    order = rng.sample(range(10_000), len(keys))
    frame = daft.from_pydict({"name": list(range(len(keys))), "key": keys, "order": order})
    marked = mark_duplicates(frame).sort("name").to_pydict()
    expected = [
        any(keys[j] == keys[i] and order[j] < order[i] for j in range(len(keys)))
        for i in range(len(keys))
    ]
    assert marked["is_duplicate"] == expected
    assert marked["name"] == list(range(len(keys)))
    assert set(marked) == {"name", "key", "order", "is_duplicate"}
