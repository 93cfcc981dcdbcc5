"""Small real inputs for the data tests: source trees, wheels and recipes."""

import zipfile
from pathlib import Path
from typing import Any

from codellama.recipe import Recipe

MIT_TEXT = """MIT License

Copyright (c) 2020 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction ...
"""


def program(name: str, n_lines: int = 12) -> str:
    """A distinct Python module of ordinary code."""
    lines = [f'"""The module {name}."""', ""]
    for number in range(n_lines):
        lines.append(f"def {name}_{number}(first, second):")
        lines.append(f"    return first * {number} + second")
    return "\n".join(lines) + "\n"


def write_tree(root: Path, files: dict[str, str | bytes], licence: str = MIT_TEXT) -> Path:
    """A folder of repositories: the first part of each path gets the licence file."""
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        if "/" in path:
            (root / path.split("/")[0] / "LICENSE").write_text(licence)
    return root


def write_wheel(
    folder: Path,
    name: str,
    files: dict[str, str],
    version: str = "1.0",
    licence: str = "License-Expression: MIT\n",
) -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{licence}"
        archive.writestr(f"{info}/METADATA", metadata)
        wheel_file = (
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/WHEEL", wheel_file)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in files))
    return wheel


def make_recipe(work: Path, sources: Any, **corpus: Any) -> Recipe:
    """A recipe with the given sources (a folder means a tree of it)."""
    if isinstance(sources, Path):
        sources = [{"name": "tree", "path": str(sources)}]
    return Recipe.model_validate(
        {
            "name": "test",
            "work": str(work),
            "corpus": {"sources": sources, **corpus},
            "model": {"name": "tiny"},
            "stages": {
                "code": {"steps": 1, "batch_tokens": 512, "micro_batch": 1, "peak_lr": 1e-3}
            },
        }
    )
