"""Imports: what a source file names, found by the grammar of its language.

Tree-sitter reads files that no compiler would accept, too, and passes over comments and strings.

In: a file's text and language. Out: names as they are written there, such as `..pkg.module`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from tree_sitter import Language, Node, Parser, Query, QueryCursor

_PYTHON = """
(import_statement name: [(dotted_name) @name (aliased_import name: (dotted_name) @name)])
(import_from_statement module_name: (_) @name)
(import_from_statement module_name: (_) @module
  name: [(dotted_name) @name (aliased_import name: (dotted_name) @name)])
"""
_SCRIPT = """
[(import_statement source: (string (string_fragment) @name))
 (import_require_clause source: (string (string_fragment) @name))
 (export_statement source: (string (string_fragment) @name))]
(call_expression function: [(identifier) (import)] @called
  arguments: (arguments . (string (string_fragment) @name)) (#any-of? @called "require" "import"))
"""
_INCLUDE = (
    "(preproc_include path: [(string_literal (string_content) @name) (system_lib_string) @name])"
)
_JAVA = "(import_declaration [(scoped_identifier) (identifier)] @name)"


# Of each language the module of its grammars, their names, the likelier first, and what to ask.
# TypeScript's include JavaScript (in 6.5 MB they found what its own does); `<T>x` is a cast in one
# of them and an element in the other.
_GRAMMARS = {
    "python": ("tree_sitter_python", ["language"], _PYTHON),
    "java": ("tree_sitter_java", ["language"], _JAVA),
    **dict.fromkeys(("c", "cpp", "cuda"), ("tree_sitter_cpp", ["language"], _INCLUDE)),
    **dict.fromkeys(
        ("javascript", "jsx", "typescript"),
        ("tree_sitter_typescript", ["language_typescript", "language_tsx"], _SCRIPT),
    ),
}


def imported_names(text: str, language: str) -> set[str]:
    """What a file imports; nothing where no grammar of the language is at hand."""
    names: set[str] = set()
    content = text.encode("utf-8", "replace")
    for parser, query in _grammars(language):
        tree = parser.parse(content)
        for _, nodes in QueryCursor(query).matches(tree.root_node):
            name, module = (_text(nodes.get(key, [])) for key in ("name", "module"))
            names.add(f"{module}{'.' if module.strip('.') else ''}{name}")
        if not tree.root_node.has_error:
            break
    return names


def _text(nodes: list[Node]) -> str:
    """The source of a name, without brackets and the blanks that Python allows beside dots."""
    text = b"".join(node.text or b"" for node in nodes).decode("utf-8", "replace")
    return "".join(text.split()).strip("<>")


@cache
def _grammars(language: str) -> list[tuple[Parser, Query]]:
    module, names, query = _GRAMMARS.get(language, ("", [], ""))
    loaded = [Language(getattr(import_module(module), name)()) for name in names]
    return [(Parser(grammar), Query(grammar, query)) for grammar in loaded]
