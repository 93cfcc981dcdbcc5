"""Filters: keep a file as a document, or drop it with a reason that is counted.

Every filter is a plain function of a path, a licence or a text; none changes a text. Decoding is
the only step from bytes to text, and line ends stay as they are. Duplicates are `dedup`'s.

In: bytes and where they come from. Out: `Verdict`, of text and reason one empty.
"""

from __future__ import annotations

import re
import symtable
import warnings
from dataclasses import dataclass

import re2

from codellama.data.licences import UNKNOWN, is_permissive, licence_of_header
from codellama.recipe import Filters

REASONS = (
    *("unavailable", "damaged archive", "archive bomb", "unsafe path", "missing column"),
    *("damaged row", "vendored", "minified", "licence", "unreadable", "too small", "too large"),
    *("not UTF-8", "binary", "generated", "long lines", "mean line length", "alphanumeric share"),
    *("data", "does not parse", "benchmark", "duplicate", "near duplicate"),
)
"""Why a file is dropped, in the order in which it is asked; only the first reason counts."""

VENDORED_FOLDERS = frozenset(
    {"_vendor", "_vendored", "vendor", "vendored", "vendors", "_vendors", "patched"}
    | {"extern", "externals", "_extern", "third_party", "_third_party", "thirdparty", "3rdparty"}
)
"""A held-out package that another one carries along would be trained on through these."""

_LOCK_FILES = frozenset(
    {"package-lock.json", "yarn.lock", "pnpm-lock.yaml", "poetry.lock", "uv.lock", "pipfile.lock"}
    | {"cargo.lock", "gemfile.lock", "composer.lock", "go.sum", "npm-shrinkwrap.json"}
)
_MINIFIED = re.compile(r"[.-](?:min|bundle|prod)\.(?:js|mjs|css)$|\.chunk\.js$")
_GENERATED_NAME = re.compile(r"\.pb\.(?:go|cc|h)$|\.designer\.cs$|\.g\.dart$|_generated\.\w+$")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A document's text, or the reason why there is none."""

    text: str | None
    reason: str | None
    licence: str | None = None  # what the first lines say, else what was given


def judge_path(path: str, licence: str, filters: Filters) -> str | None:
    """The reason to drop a file without reading it, if there is one."""
    *folders, name = path.lower().split("/")
    if not VENDORED_FOLDERS.isdisjoint(folders):
        return "vendored"
    if _MINIFIED.search(name):
        return "minified"
    if licence != UNKNOWN and not is_allowed(licence, filters):
        return "licence"  # an unknown one may stand in the first lines
    if name in _LOCK_FILES:
        return "data"
    return "generated" if _GENERATED_NAME.search(name) else None


def is_allowed(licence: str, filters: Filters) -> bool:
    """Whether documents of a licence may be in the corpus."""
    if not filters.permissive_only or licence in filters.allowed_licences:
        return True
    return is_permissive(licence)


def judge_bytes(
    content: bytes,
    filters: Filters,
    language: str = "python",
    is_code: bool = True,
    licence: str | None = None,
) -> Verdict:
    """Decode a file and judge its text; licence: what holds where its first lines do not say."""
    if len(content) < filters.min_bytes:
        return Verdict(None, "too small")
    if len(content) > filters.max_bytes:
        return Verdict(None, "too large")
    if b"\0" in content:
        return Verdict(None, "binary")
    try:
        text = content.decode("utf-8-sig")  # a byte order mark is no part of the program
    except UnicodeDecodeError:
        return Verdict(None, "not UTF-8")
    licence = licence_of_header(text) or licence
    if licence and not is_allowed(licence, filters):
        return Verdict(None, "licence")
    reason = judge_text(text, filters, language, is_code)
    return Verdict(None, reason) if reason else Verdict(text, None, licence)


def judge_text(
    text: str, filters: Filters, language: str = "python", is_code: bool = True
) -> str | None:
    """The reason to drop a text of acceptable size, if there is one; cheap filters first.

    Of prose, lines may be of any length: many people write a paragraph as one.
    """
    if is_code:
        if is_generated(text, language):
            return "generated"
        lengths = list(map(len, text.splitlines()))
        if max(lengths, default=0) > filters.max_line_chars:
            return "long lines"
        if sum(lengths) > filters.max_mean_line_chars * len(lengths):
            return "mean line length"
    if alphanumeric_share(text) < filters.min_alphanumeric_share:
        return "alphanumeric share"
    if data_share(text) > filters.max_data_share:
        return "data"
    if is_code and language == "python" and filters.parse_python and not parses(text):
        return "does not parse"
    return None


_NOT_WORD = bytes(i for i in range(128) if not chr(i).isalnum())


def alphanumeric_share(text: str) -> float:
    """Share of letters and digits among the UTF-8 bytes; every non-ASCII byte counts as one."""
    content = text.encode()
    return len(content.translate(None, _NOT_WORD)) / max(len(content), 1)


# Runs that are data whatever surrounds them: escaped bytes, base64 or hexadecimal text longer than
# any name, and tables of numbers (at least 16 in a row, so that ordinary tuples stay code). RE2
# looks for all of them at once, at 490 MB/s; with `re` it was 10.
_NUMBER = r"[-+]?(?:0[xX][0-9a-fA-F]+|\d[\d_.]*(?:[eE][-+]?\d+)?)"
_DATA = re2.compile(
    r"(?:\\x[0-9a-fA-F]{2}){8,}|(?:\\[uU][0-9a-fA-F]{4,8}){8,}|[A-Za-z0-9+/]{64,}={0,2}"
    rf"|(?:{_NUMBER}[\s,;()\[\]]+){{16,}}"
)


def data_share(text: str) -> float:
    """Share of characters inside runs of encoded bytes, base64 or numbers."""
    return sum(run.end() - run.start() for run in _DATA.finditer(text)) / max(len(text), 1)


_CLAIM = r""" (?!.* \b includes? \b) .*? (?:
        \b auto (?:matically)? [ -]? generated \b | \b generated[ ]automatically \b
      | \b do[ ]not[ ](?:edit|modify) \b (?![ ]unless)
      | @generated \b
      | (?: OPENER \s* | \b (?:file|code|module|script) [ ] (?: (?:is|was|has[ ]been) [ ] )? )
        generated [ ] (?:by|from|with|using|via|on) \b
    )"""
# Only comments and first docstring lines claim it: "parses files generated by gcc" is prose, and
# "includes files automatically generated" speaks of others.
_GENERATED_PYTHON = re.compile(
    r"""(?imx) ^ \s* (?= \# | r?\"{3} | r?'{3} )""" + _CLAIM.replace("OPENER", r"""[#"']""")
)
_GENERATED = re.compile(
    r"(?imx) ^ \s* (?= \# | /[/*] | \* | -- | ; | <!-- | % )" + _CLAIM.replace("OPENER", "[#/*;-]")
)

# A sentence that goes on in the next line, which therefore claims nothing by its first word.
_WRAPPED = re.compile(r"(\w[ ,]+\w+[ ,]+\w+,?)\n[ \t]*(?:#|//|\*|--|;)?[ \t]*(?=[a-z])")


def is_generated(text: str, language: str = "python") -> bool:
    """Whether the first ten lines say that a program wrote the file."""
    head = text[:4000]
    if not any(words in head.lower() for words in ("generated", "do not ")):
        return False  # 4 times as fast
    head = _WRAPPED.sub(r"\1 ", "\n".join(head.splitlines()[:10]))
    return (_GENERATED_PYTHON if language == "python" else _GENERATED).search(head) is not None


def parses(text: str) -> bool:
    """Whether the running interpreter accepts the text as a module.

    `symtable` builds no Python tree, which makes it 1.7 times as fast as `ast.parse` (measured).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        try:
            symtable.symtable(text, "document", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False  # MemoryError is what the parser raises for too deep nesting
    return True
