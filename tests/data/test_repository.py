import json
import random
from pathlib import Path

from trees import make_recipe, program, write_tree

from codellama.data.corpus import CorpusReader
from codellama.data.languages import language_of
from codellama.data.prepare import prepare_corpus
from codellama.data.repository import dependency_order


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
    reader = CorpusReader(recipe.repositories_dir, "train")
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
    assert len(CorpusReader(recipe.repositories_dir, "validation")) == 1
    manifest = json.loads((recipe.repositories_dir / "manifest.json").read_text())
    assert manifest["made_from"] == CorpusReader(corpus, "train").fingerprint
