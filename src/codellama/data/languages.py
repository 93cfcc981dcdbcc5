"""Languages: which one a file is written in, by its name or its first line.

The list is Pygments' (some 400 languages with their file names), read through its public table;
here is only what that table leaves open: names that several languages claim, interpreters with
another name than their language, and which of the names stand for prose or for data.

In: a path and the first bytes of a file. Out: Pygments' short name, such as `python`, or None.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

Kind = Literal["code", "code-text", "text"]
"""Code, text about code, natural language: the three data sets of the paper's Table 1."""

PROSE = frozenset({"markdown", "restructuredtext", "asciidoc", "org", "text", "tex", "notebook"})
DATA = frozenset(
    {"json", "jsonld", "json-object", "json5", "yaml", "toml", "ini", "xml", "csv", "diff"}
    | {"properties", "registry", "gettext", "pot", "svg", "output", "desktop", "systemd", "turtle"}
)
"""Names of data and settings; a source that wants every language does not get these."""


# Endings that Pygments gives to several languages, and some common ones that it does not list.
def _by_name(table: str) -> dict[str, str]:
    """Names and their languages, from a table of a language and its names in each part."""
    rows = (part.split() for part in table.split(","))
    return {name: language for language, *names in rows for name in names}


_ENDINGS = _by_name(
    """
asciidoc .adoc .asciidoc, c .h, common-lisp .cl .lisp, cpp .cc, csharp .cs, elixir .ex, fsharp
.fs, gas .s, gdscript .gd, glsl .frag .glsl .vert, html .htm .html, ini .cfg, lex .l, m4 .m4,
modula2 .mod, nasm .asm, notebook .ipynb, objective-c .m, objective-c++ .mm, ocaml .ml, org .org,
perl .pl .pm .t, php .inc, prolog .pro, puppet .pp, python-stub .pyi, r .r, restructuredtext .rst,
scala .sc, sql .sql, starlark .bzl, svelte .svelte, svg .svg, tex .cls, text .txt, toml .lock,
typescript .ts .tsx, verilog .v, xslt .xsl
"""
)
_INTERPRETERS = _by_name(
    """
awk gawk, bash dash ksh ash, erlang escript, haskell runhaskell, javascript node nodejs, python
pypy, r rscript, tcl wish tclsh, typescript deno
"""
)


def language_of(path: str, head: bytes = b"") -> str | None:
    """The language of a file; the first line decides only where the name says nothing."""
    name = path.rsplit("/", 1)[-1]
    stem, dot, ending = name.rpartition(".")
    table = _table()
    found = table.get(name.lower())
    if dot and stem and not found:
        found = _ENDINGS.get(f".{ending.lower()}")
        found = found or table.get(f".{ending}") or table.get(f".{ending.lower()}")
    return found or _of_shebang(head)


def kind_of(language: str) -> Kind:
    """What a file of this language is among source code: code, or text about it."""
    return "code-text" if language in PROSE else "code"


def _of_shebang(head: bytes) -> str | None:
    if not head.startswith(b"#!"):
        return None
    words = head[2:200].split(b"\n")[0].decode("ascii", "replace").split()
    if words and words[0].endswith("/env"):  # behind it may stand options and variables
        words = [word for word in words[1:] if word[0] != "-" and "=" not in word]
    name = words[0].rsplit("/", 1)[-1].lower() if words else ""
    name = re.sub(r"[\d.]+$", "", name)  # python3.11
    name = _INTERPRETERS.get(name, name)
    return _table().get(f"#!{name}")


@lru_cache(maxsize=1)
def _table() -> dict[str, str]:
    """`.ending`, whole file name or `#!interpreter` -> language."""
    from pygments.lexers import get_all_lexers

    table = {"readme": "text"}
    for _, aliases, patterns, _ in get_all_lexers(plugins=False):
        if not aliases or ("+" in aliases[0] and aliases[0] not in ("c++", "objective-c++")):
            continue  # templates inside another language, such as html+django
        language = "bash" if aliases[0] == "sh" else aliases[0].lower()
        for alias in aliases:
            table.setdefault(f"#!{alias.lower()}", language)
        for pattern in patterns:
            key = pattern.removeprefix("*")
            if not any(sign in key for sign in "[?*"):
                # The table is in the order of names; the plain language comes before dialects.
                table.setdefault(key if key.startswith(".") else key.lower(), language)
    return table
