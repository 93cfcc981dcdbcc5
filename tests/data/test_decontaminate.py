"""Planted copies of benchmark problems: as they are, reformatted, renamed, cut out."""

import ast
import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from codellama.data.benchmarks import benchmark_texts
from codellama.data.decontaminate import BlockList, build_block_list, code_tokens, cut
from codellama.recipe import Benchmarks

# Made up in the manner of the public benchmarks.
PROBLEMS = [
    (
        "from typing import List\n\n\ndef longest_plateau(values: List[int], slack: int) -> int:\n"
        '    """ Given the heights along a mountain trail, return how many steps in a row a hiker\n'
        "    can take while the difference of the highest and the lowest stays within slack.\n"
        '    >>> longest_plateau([1, 2, 2, 9], 1)\n    3\n    """\n',
        "    best = 0\n    begin = 0\n    for end in range(len(values)):\n"
        "        while max(values[begin:end + 1]) - min(values[begin:end + 1]) > slack:\n"
        "            begin += 1\n        best = max(best, end - begin + 1)\n    return best\n",
    ),
    (
        "def merge_words(left: str, right: str) -> str:\n"
        '    """ Interleave the words of two sentences, beginning with the left, and append what\n'
        '    is left of the longer sentence unchanged.\n    """\n',
        "    out = []\n    first, second = left.split(), right.split()\n"
        "    for position in range(max(len(first), len(second))):\n"
        "        if position < len(first):\n            out.append(first[position])\n"
        "        if position < len(second):\n            out.append(second[position])\n"
        "    return ' '.join(out)\n",
    ),
]
BEFORE = "import os\n\n\ndef before(path):\n    return os.listdir(path)\n\n\n"
AFTER = "\n\ndef after(path):\n    return before(path)[::-1]\n"


@pytest.fixture(scope="module")
def block_list(tmp_path_factory: pytest.TempPathFactory) -> BlockList:
    folder = tmp_path_factory.mktemp("made")
    rows = [
        {"task_id": f"T/{n}", "prompt": p, "canonical_solution": s}
        for n, (p, s) in enumerate(PROBLEMS)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "problems.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "questions.csv").write_text(
        'q,a\n"How many grains of sand fit into the pail that a child of four can carry home?",9\n'
    )
    built = build_block_list(Benchmarks(paths=(str(folder),)))
    built.save(folder / "list.npz")
    return BlockList.load(folder / "list.npz")


def renamed(code: str) -> str:
    """Other names everywhere, no docstring, another layout."""
    tree = ast.parse(code)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names[node.name] = f"task{len(names)}"
            node.name, node.body = names[node.name], node.body[1:]
            node.returns = None
        elif isinstance(node, ast.arg):
            names.setdefault(node.arg, f"param{len(names)}")
            node.arg, node.annotation = names[node.arg], None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.setdefault(node.id, f"local{len(names)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return ast.unparse(tree)


WAYS: dict[str, Any] = {
    "as it is": lambda prompt, solution: prompt + solution,
    "tabs": lambda prompt, solution: (prompt + solution).replace("    ", "\t"),
    "one space": lambda prompt, solution: " ".join((prompt + solution).split()),
    "camel and quotes": lambda prompt, solution: (prompt + solution).replace('"""', "'''").upper(),
    "prompt alone": lambda prompt, solution: prompt + "    pass\n",
    "renamed": lambda prompt, solution: renamed(prompt + solution),
    "in a comment": lambda prompt, solution: "".join(f"# {x}\n" for x in prompt.splitlines()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(len(PROBLEMS)))
def test_planted_copies_are_found(block_list: BlockList, way: str, number: int) -> None:
    text = BEFORE + WAYS[way](*PROBLEMS[number]) + AFTER
    assert block_list.find(text, is_code=True).benchmarks == (f"{NAME}/problems.jsonl.gz",)


NAME = "made0"  # of pytest's temporary folder


def test_prose_is_found_as_prose(block_list: BlockList) -> None:
    question = "how many Grains of sand fit into the pail, that a child of four can carry home"
    assert block_list.find(f"x\n\n{question}\n\ny", is_code=False).benchmarks == (
        f"{NAME}/questions.csv",
    )
    assert not block_list.find("How many grains of sand fit into a bucket?", False).benchmarks


def test_other_code_is_not_hit(block_list: BlockList) -> None:
    assert not block_list.find(BEFORE + AFTER, True).benchmarks
    n_files = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        text = file.read_bytes().decode("utf-8", "ignore")
        assert block_list.find(text, True).benchmarks == (), file
        n_files += 1
    assert n_files == 60


def test_variables_have_no_names_and_everything_else_does() -> None:
    a, b = (code_tokens(t) for t in ("x = f(y) + y.z", "q = g(w)  +  w.z  # same"))
    assert all((one == two).all() for one, two in zip(a, b, strict=True))
    for other in ("x = f(y) + x.z", "x = f(y) + y.w", "x = f(y) - y.z", "x = len(y) + y.z"):
        c = code_tokens(other)
        assert any((one != two).any() for one, two in zip(a, c, strict=True))


@pytest.mark.parametrize("number", range(len(PROBLEMS)))
def test_cutting_leaves_the_rest(block_list: BlockList, number: int) -> None:
    text = BEFORE + "".join(PROBLEMS[number]) + AFTER
    rest = cut(text, block_list.find(text, True).spans, is_code=True)
    assert not block_list.find(rest, True).benchmarks
    assert "def before" in rest
    assert "def after" in rest
    compile(rest, "rest", "exec")
    prose = "First paragraph.\nStill.\n\n" + PROBLEMS[number][0] + "\n\nLast one, ünïcode.\n"
    rest = cut(prose, block_list.find(prose, False).spans, is_code=False)
    assert rest.startswith("First paragraph.\nStill.\n")
    assert rest.endswith("Last one, ünïcode.\n")
    assert not block_list.find(rest, False).benchmarks


def test_licence_texts_and_numbers_are_no_passages(tmp_path: Path) -> None:
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this"
    licence += " software and associated documentation files (the Software) without restriction"
    numbers = ", ".join(map(str, range(50)))
    header = (  # as it stands above a file of a benchmark, and above any other file
        "# Licensed under the Apache License, Version 2.0 (the License); you may not use this\n"
        "# file except in compliance with the License. You may obtain a copy of the License at\n"
        "#\n#     http://www.apache.org/licenses/LICENSE-2.0\n#\n# Unless required by applicable\n"
        "# law or agreed to in writing, software distributed under the License is distributed on\n"
        "# an AS IS BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, express or implied.\n"
        "# IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY,\n"
        "# WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM IT OR THE USE OF IT\n"
    )
    texts = [licence[:86], numbers, header + "import os\n", "".join(PROBLEMS[0])]
    (tmp_path / "b.json").write_text(json.dumps(texts))
    built = build_block_list(Benchmarks(paths=(str(tmp_path),)))
    assert not built.find(numbers, True).benchmarks
    assert not built.find(licence[:86] + " and more", True).benchmarks
    assert not built.find(header + BEFORE + AFTER, True).benchmarks
    assert built.find(header + "".join(PROBLEMS[0]), True).benchmarks


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"q": ["one", {"deep": "two"}], "n": 3}))
    (tmp_path / "a.csv").write_text('\ufeffx,y\n"a, b",c\n')
    (tmp_path / "a.txt").write_text("plain")
    assert list(benchmark_texts(tmp_path / "a.json")) == ["one", "two"]
    assert list(benchmark_texts(tmp_path / "a.csv")) == ["x", "y", "a, b", "c"]
    assert list(benchmark_texts(tmp_path / "a.txt")) == ["plain"]
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.jsonl: cannot be read as \.jsonl"):
        build_block_list(Benchmarks(paths=(str(tmp_path / "bad.jsonl"),)))
    with pytest.raises(ValueError, match="no such file or folder"):
        build_block_list(Benchmarks(paths=(str(tmp_path / "nothing"),)))
