"""Repositories: all files of one repository as one document, in the order of their dependencies.

For long contexts: what a file imports stands before it. Each is headed by a comment with its path.

In: a corpus folder. Out: another corpus folder, whose documents are repositories or parts of them.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from codellama.artifact import new_folder, write_manifest
from codellama.data.corpus import KIND, SCHEMA, SPLITS, CorpusReader, ShardWriter, Split
from codellama.data.imports import imported_names
from codellama.data.split import unit_hash

PART_BYTES = 400_000  # about 100,000 tokens; a larger repository becomes several documents
# A line that is a comment, of languages where `# ` begins none.
_FORMS = {
    "// {}": "asciidoc c cpp csharp cuda d dart delphi fsharp glsl go groovy haxe hlsl java "
    "javascript jsonnet jsx kotlin less objective-c objective-c++ protobuf rust scala scss "
    "solidity stata swift systemverilog tsx typescript typst v vala verilog wgsl zig",
    "-- {}": "ada agda eiffel elm haskell idris lean lean4 lua luau mysql plpgsql postgresql "
    "purescript sql sqlite3 transact-sql tsql vhdl",
    "; {}": "clojure clojurescript common-lisp emacs-lisp fennel hylang llvm nasm racket scheme",
    "% {}": "bibtex erlang matlab octave postscript prolog tex",
    "! {}": "fortran fortranfixed",
    "' {}": "qbasic vb.net vbscript",
    "/* {} */": "css rexx sas",
    "(* {} *)": "coq isabelle mathematica modula2 ocaml sml",
    "<!-- {} -->": "html markdown notebook svelte svg vue xml xslt",
    "<?php // {} ?>": "php",
}
_COMMENTS = {language: form for form, names in _FORMS.items() for language in names.split()}


def write_repositories(corpus: Path, folder: Path) -> None:
    """Write the corpus of whole repositories.

    Raises:
        ValueError: the corpus is missing or damaged.
    """
    shards: list[dict[str, Any]] = []
    n_documents: dict[str, int] = {}
    with new_folder(folder) as partial:
        for split in SPLITS:
            reader = CorpusReader(corpus, split)
            writer = ShardWriter(partial, split)
            for row in _rows(reader, split):
                writer.add(pa.Table.from_pylist([row], schema=SCHEMA))
            writer.close()
            shards += writer.shards
            n_documents[split] = sum(shard["rows"] for shard in writer.shards)
        digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
        write_manifest(
            partial,
            KIND,
            made_from=CorpusReader(corpus, "train", verify=False).fingerprint,
            n_documents=n_documents,
            shards=shards,
            fingerprint=digest.hexdigest(),
        )


def _rows(reader: CorpusReader, split: Split) -> Iterator[dict[str, Any]]:
    """One row for each part of each repository, in an order by hash."""
    names = ("source", "repository", "path", "language", "licence", "kind")
    columns = {name: reader.column(name) for name in names}
    # Rows of a table without a column for it are of no repository.
    sources = reader.manifest["config"]["sources"]
    none = {(s["name"], s["name"]) for s in sources if s["kind"] in ("parquet", "jsonl")}
    members: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(columns["source"], columns["repository"], strict=True)):
        if key not in none:
            members.setdefault(key, []).append(index)
    for source, repository in sorted(members, key=lambda key: unit_hash(0, "/".join(key))):
        indices = {columns["path"][i]: i for i in members[source, repository]}
        texts = {path: reader.text(i) for path, i in indices.items()}
        languages = {path: columns["language"][i] for path, i in indices.items()}
        part: list[str] = []
        n_bytes = 0
        ordered = dependency_order(texts, languages)
        for number, path in enumerate(ordered):
            part.append(path)
            n_bytes += len(texts[path])
            if n_bytes < PART_BYTES and number + 1 < len(ordered):
                continue
            forms = {p: _COMMENTS.get(languages[p], "# {}") for p in part}
            text = "\n\n".join(f"{forms[p].format(p)}\n{texts[p]}" for p in part)
            content = text.encode()
            kept = [indices[p] for p in part]
            yield {
                "text": text,
                "source": source,
                "repository": repository,
                "path": part[0],
                "language": _most(columns["language"][i] for i in kept),
                "kind": _most(columns["kind"][i] for i in kept),
                "licence": " AND ".join(sorted({columns["licence"][i] for i in kept})),
                "n_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "split": split,
            }
            part, n_bytes = [], 0


def _most(values: Iterator[str]) -> str:
    found = list(values)
    return max(sorted(set(found)), key=found.count)


def dependency_order(texts: dict[str, str], languages: dict[str, str]) -> list[str]:
    """Paths so that a file stands behind those that it imports; else, and in circles, by path."""
    resolve = _Resolver(texts)
    order: list[str] = []
    seen: set[str] = set()
    # Our own stack, for chains are longer than Python's; at its bottom a file that imports all.
    stack = [("", iter(sorted(texts)))]
    while stack:
        following = next((path for path in stack[-1][1] if path not in seen), None)
        if following is None:
            order.append(stack.pop()[0])
        else:
            seen.add(following)
            found = resolve.imports(following, texts[following], languages[following])
            stack.append((following, found))
    return order[:-1]


class _Resolver:
    """From what an import says to a file of the same repository."""

    def __init__(self, paths: dict[str, str]) -> None:
        self._paths = set(paths)
        self._by_end: dict[str, list[str]] = {}
        for path in sorted(paths):
            parts = path.split("/")
            for begin in range(len(parts)):
                self._by_end.setdefault("/".join(parts[begin:]), []).append(path)

    def imports(self, path: str, text: str, language: str) -> Iterator[str]:
        """Files that a file imports, without itself, by path."""
        found = {
            file
            for name in imported_names(text, language)
            for file in self._files(path, name, language)
        }
        return iter(sorted(found - {path}))

    def _files(self, path: str, name: str, language: str) -> Iterator[str]:
        folder = posixpath.dirname(path)
        if language == "python":
            inner = name.lstrip(".")
            above = path.split("/")[: len(inner) - len(name)] if inner != name else []
            stem = "/".join([*above, *filter(None, inner.split("."))])
            files = [self._named(f"{stem}{end}", f"{stem}{end}") for end in (".py", "/__init__.py")]
        elif language == "java":  # a class, or a member of one
            ends = [f"{stem.replace('.', '/')}.java" for stem in (name, name.rpartition(".")[0])]
            files = [self._named("", end) for end in ends]
        elif language in ("c", "cpp", "cuda"):
            files = [self._named(posixpath.join(folder, name), name)]
        else:
            files = [self._script(folder, name)]
        yield from filter(None, files)

    def _named(self, exact: str, end: str) -> str | None:
        """The file at a path, or the only one that ends like it."""
        exact = posixpath.normpath(exact) if exact else ""
        if exact in self._paths:
            return exact
        candidates = self._by_end.get(posixpath.normpath(end).lstrip("./"), [])
        return candidates[0] if len(candidates) == 1 else None

    def _script(self, folder: str, name: str) -> str | None:
        """The file that a relative name of JavaScript stands for; others are packages."""
        if not name.startswith("."):
            return None
        stem = posixpath.normpath(posixpath.join(folder, name))
        endings = ("", ".ts", ".tsx", ".js", ".jsx", ".mjs", "/index.ts", "/index.js")
        stems = (stem, posixpath.splitext(stem)[0]) if name.endswith(".js") else (stem,)
        return next((s + e for s in stems for e in endings if s + e in self._paths), None)
