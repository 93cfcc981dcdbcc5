"""Questions and tests as models write them, and instruction sets as people publish them."""

import json

import pytest

from codellama.data.decontaminate import build_block_list
from codellama.recipe import Benchmarks, NearDuplicates
from codellama.selfinstruct.questions import (
    SEEDS,
    as_question,
    distinct,
    read_batch,
    read_instructions,
)
from codellama.selfinstruct.unit_tests import read_tests

NEAR = NearDuplicates(threshold=0.7, ngram=3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("assert f(1) == 1\nassert f(2) == 2", "no markers"),
        ("[TESTS]\nassert f(1) == 1\nassert f(2)", "no markers"),
        ("[/TESTS]\nassert f(1) == 1\n[TESTS]", "no markers"),
        ("[TESTS]\nassert f(1) ==\n[/TESTS]", "not Python"),
        (f"[TESTS]\nassert f({'(' * 5000})\n[/TESTS]", "not Python"),
        (f"[TESTS]\nassert f({'-' * 15000}1)\nassert f(2)\n[/TESTS]", "not Python"),
        ("[TESTS]\nassert f(1)\n\0\n[/TESTS]", "not Python"),
        ("[TESTS]\n[/TESTS]", "fewer than 2 tests"),
        ("[TESTS]\nassert f(1) == 1\nassert f(1)==1  # again\n[/TESTS]", "fewer than 2 tests"),
        ("[TESTS]\nassert f(1) == 1\nprint(f(2))\n[/TESTS]", "not only asserts"),
        ("[TESTS]\nassert f(1) == g(1)\nassert f(2) == 2\n[/TESTS]", "not about one function"),
        ("[TESTS]\nassert 1 == 1\nassert len([]) == 0\n[/TESTS]", "not about one function"),
        ("[TESTS]\nassert f('[INST]')\nassert f(2)\n[/TESTS]", "a tag of the chat format"),
    ],
)
def test_malformed_tests(text, reason):
    assert read_tests(text, 2) == {"reason": reason}


def test_well_formed_tests():
    text = "Sure!\n[TESTS]\n# Test case 1:\nassert f([x for x in 'a']) == ['a'] \n"
    found = read_tests(text + "# Test case 2:\nassert sum(f([1, 2])) == 3\n[/TESTS] Enjoy.", 2)
    assert found == {
        "name": "f",
        "tests": ["assert f([x for x in 'a']) == ['a']", "assert sum(f([1, 2])) == 3"],
    }


def test_an_answer_without_items_is_counted():
    row = {"task_id": "batch/3", "completion": "I cannot.", "finish_reason": "stop"}
    assert list(read_batch(row)) == [{"id": "batch/3", "reason": "no numbered items"}]


def test_benchmark_questions_are_dropped_and_seeds_are_none(shared_data):
    paths = (str(shared_data / "humaneval" / "HumanEval.jsonl.gz"),)
    block_list = build_block_list(Benchmarks(paths=paths, ngram=6))
    asked = (
        "Check if in given list of numbers, are any two numbers closer to each other than given "
        "threshold. has_close_elements([1.0, 2.0, 3.0], 0.5) is False"
    )
    rows = [{"id": str(i), "question": text} for i, text in enumerate([asked, *SEEDS])]
    found = [row for row in distinct(rows, NEAR, block_list) if "reason" in row]
    assert [row["id"] for row in found] == ["0"]
    assert found[0]["reason"].startswith("overlaps humaneval/")


def test_held_out_problems_win_over_what_came_before():
    words = "Return every word of a text that begins with the letter that was given by the caller"
    rows = [
        {"id": "train", "question": f"{words}, sorted."},
        {"id": "held", "question": f"{words}.", "held_out": True},
    ]
    reasons = {row["id"]: row.get("reason") for row in distinct(rows, NEAR, None)}
    assert reasons == {"train": "like held", "held": None}


def test_instruction_sets(tmp_path):
    path = tmp_path / "set.jsonl"
    chat = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "```\nx = 1\n```"},
    ]
    alpaca = {"instruction": "Double it.", "input": "x", "output": "def f(x):\n    return 2 * x"}
    bad = [{"role": "assistant", "content": "?"}]
    path.write_text("\n".join(map(json.dumps, [{"messages": chat}, alpaca, {"messages": bad}])))
    rows = list(read_instructions(path))
    assert [row.get("reason", "")[:9] for row in rows] == ["", "", "message 0"]
    questions = [as_question(row) for row in rows]
    assert questions[0]["reference"] is None  # no function
    assert questions[1]["question"] == "Double it.\n\nx"
    assert questions[1]["reference"] == alpaca["output"]
    path.write_text('{"prompt": "?"}\n')
    with pytest.raises(ValueError, match=r"set\.jsonl:1: expected messages"):
        list(read_instructions(path))
