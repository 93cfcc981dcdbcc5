"""Text about code inside other files: cells of notebooks, long docstrings and comments.

In: the content of one file. Out: one text.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import warnings

MIN_DOCSTRING_CHARS = 300  # shorter ones say little without their function
MIN_TEXT_CHARS = 1_000  # of a file, below which no document of its own is made


def notebook_text(content: bytes) -> str | None:
    """Markdown of a notebook, its code cells in fences; None if it is no notebook.

    Outputs are left out: they are images, tables and traces.
    """
    try:
        notebook = json.loads(content)
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        parts: list[str] = []
        for cell in cells:
            source = cell.get("source", cell.get("input", ""))
            text = source if isinstance(source, str) else "".join(source)
            if not text.strip():
                continue
            fence = "```" if cell.get("cell_type") == "code" else ""
            parts.append(f"{fence}\n{text}\n{fence}" if fence else text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return "\n\n".join(parts) + "\n"


_COMMENTS = re.compile(r"(?m)(?:^[ \t]*#(?!!)[^\n]*\n){5,}")


def docstrings(text: str) -> str:
    """Long docstrings and blocks of comments of a Python file, empty where they are few."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    parts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found and len(found) >= MIN_DOCSTRING_CHARS:
                name = getattr(node, "name", "")
                parts.append(f"{name}\n\n{found}" if name else found)
    for block in _COMMENTS.findall(text):
        lines = inspect.cleandoc("\n".join(line.strip()[1:] for line in block.splitlines()))
        if len(lines) >= MIN_DOCSTRING_CHARS:
            parts.append(lines)
    joined = "\n\n\n".join(parts)
    return joined + "\n" if len(joined) >= MIN_TEXT_CHARS else ""
