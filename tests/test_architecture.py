"""The rules of the package that a reader relies on: who imports whom, how large, what is named how.

Layers stand from the bottom to the top; a module imports only what its own line names.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import codellama

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "codellama"
FILES = sorted(PACKAGE.rglob("*.py"))

MODEL_SIDE = {"model", "tokenizer", "weights"}
LAYERS: dict[str, set[str]] = {
    # at the bottom: nothing of ours
    "artifact": set(),
    "recipe_corpus": set(),
    "recipe_selfinstruct": {"recipe_corpus"},
    "recipe": {"recipe_corpus", "recipe_selfinstruct"},
    "sandbox": set(),
    "rows": {"artifact"},
    "terminal": set(),
    # the parts
    "model": {"recipe", "artifact"},
    "tokenizer": {"recipe", "artifact"},
    "weights": {"model", "tokenizer", "artifact"},
    "describe": {"weights", "model", "tokenizer"},
    "data": {"tokenizer", "weights", "recipe", "artifact"},
    "train": {"model", "data", "tokenizer", "weights", "recipe", "artifact", "rows"},
    "engine": MODEL_SIDE | {"recipe"},
    "eval": {"engine", "sandbox", "data", "tokenizer", "recipe", "artifact", "rows"},
    # it samples, judges and measures as benchmarks do
    "selfinstruct": {"eval", "engine", "sandbox", "data", "tokenizer", "artifact", "rows"}
    | {"recipe", "recipe_selfinstruct"},
    "serve": {"engine", "tokenizer", "recipe", "artifact"},
    "bulk": {"engine", "rows"},
    # what people see
    "conversation": {"engine", "tokenizer", "terminal"},
    "demo": {"engine", "tokenizer", "terminal"},
    "inspection": {"describe", "artifact", "rows"},
}
# The commands may import everything but the list of commands itself; only __main__ imports that.
LAYERS["commands"] = set(LAYERS)
LAYERS["cli"] = {*LAYERS}
LAYERS["__main__"] = {"cli"}
LAYERS["__init__"] = set(LAYERS) - {"commands", "cli", "__main__"}  # resolved lazily

MAX_FILE_LINES, MAX_SOURCE_LINES = 400, 27_000
VAGUE = {"utils", "util", "common", "helpers", "misc", "base"}
# A folder of a particular machine in a text; a name that only begins alike is none.
MACHINE_PATH = re.compile(r"(?<![\w.~})/-])/(?:work|root|tmp|home)/[\w.$-]")


def relative(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """The folder or top-level module of the package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(path):
    """(line, part) of every import of ours, wherever it stands in the file."""
    package = ["codellama", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = [*above, *(node.module.split(".") if node.module else [])]
            names = [module]
            if module == ["codellama"]:  # `from codellama import weights`
                names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "codellama" and len(name) > 1:
                yield node.lineno, name[1]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_down(path):
    part = part_of(path)
    assert part in LAYERS, f"{part} has no place in the layers: add it here, with a reason"
    for line, imported in imported_parts(path):
        assert imported == part or imported in LAYERS[part], (
            f"{relative(path)}:{line} imports {imported}; {part} may import "
            f"{', '.join(sorted(LAYERS[part])) or 'nothing of ours'}"
        )


def test_the_layers_have_no_circle():
    order: list[str] = []
    while len(order) < len(LAYERS):
        ready = [p for p, below in LAYERS.items() if p not in order and below - {p} <= {*order}]
        assert ready, f"a circle among {sorted(set(LAYERS) - set(order))}"
        order += ready


def test_the_check_sees_imports(tmp_path, monkeypatch):
    """A rule that finds nothing would pass every file."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "model" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "import codellama.engine.engine\nfrom ..data import fim\nfrom . import config\n"
        "from codellama import weights\ndef f():\n    from codellama.train.loop import train\n"
    )
    found = sorted(imported_parts(file))
    assert found == [(1, "engine"), (2, "data"), (3, "model"), (4, "weights"), (6, "train")]


def test_sizes():
    n_lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    too_long = {relative(path): n for path, n in n_lines.items() if n > MAX_FILE_LINES}
    assert not too_long
    assert sum(n_lines.values()) <= MAX_SOURCE_LINES


def test_names_say_something():
    names = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not names & VAGUE


def test_every_module_says_what_it_is_for():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), relative(path)


def test_tests_mirror_the_package():
    """A test file stands beside a module or folder of the same name."""
    for test in (ROOT / "tests").rglob("test_*.py"):
        folder = PACKAGE / test.relative_to(ROOT / "tests").parent
        assert folder.is_dir(), f"{relative(test)}: there is no {relative(folder)}"


@pytest.mark.parametrize("module", ["codellama", "codellama.cli"])
def test_importing_is_light(module):
    heavy = ["torch", "daft", "transformers", "pyarrow", "pydantic", "numpy", "matplotlib"]
    code = f"import sys, {module}; print(*(set({heavy}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_public_names():
    for name in codellama.__all__:
        assert getattr(codellama, name) is not None
        assert name in dir(codellama)
    for name in ("Engine", "SamplingParams", "Tokenizer", "load"):
        assert name in codellama.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = codellama.nothing
    if (PACKAGE / "sandbox").is_dir():
        assert callable(import_module("codellama.sandbox").run)


def committed_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return [path for top in ("src", "tests", "docs") for path in (ROOT / top).rglob("*.*")]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


def test_no_paths_of_one_machine():
    found = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # binary, or deleted and not yet committed
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{relative(path)}:{number}: {match.group()}")
    assert not found


def test_names_of_test_files_are_unique():
    """pytest imports them by name alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name, n in names.items() if n > 1} == {"conftest.py"}
