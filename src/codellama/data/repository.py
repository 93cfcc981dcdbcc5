"""Repositories: all files of one repository as one document, in the order of their dependencies.

For training on long contexts: what a file imports stands before it, so that a context of 16,384
tokens holds files that belong together. Each file is headed by a comment with its path.

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
# Languages whose comments begin with two slashes.
_SLASHES = frozenset(
    """c cpp csharp java javascript typescript jsx go rust swift kotlin scala php dart d zig cuda
    groovy objective-c solidity protobuf""".split()  # noqa: SIM905
)


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
            n_documents[split] = 0
            for row in _rows(reader, split):
                writer.add(pa.Table.from_pylist([row], schema=SCHEMA))
                n_documents[split] += 1
            writer.close()
            shards += writer.shards
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
    members: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(columns["source"], columns["repository"], strict=True)):
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
            text = "\n\n".join(f"{_comment(languages[p], p)}\n{texts[p]}" for p in part)
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


def _comment(language: str, path: str) -> str:
    if language in ("markdown", "html", "xml", "vue"):
        return f"<!-- {path} -->"
    return f"// {path}" if language in _SLASHES else f"# {path}"


def dependency_order(texts: dict[str, str], languages: dict[str, str]) -> list[str]:
    """Paths so that a file stands behind those that it imports; else, and in circles, by path."""
    resolve = _Resolver(texts)
    order: list[str] = []
    state: dict[str, bool] = {}  # False while a file waits for what it imports
    for start in sorted(texts):
        stack: list[tuple[str, Iterator[str]]] = []  # our own: chains are longer than Python's
        if start not in state:
            stack.append((start, resolve.imports(start, texts[start], languages[start])))
            state[start] = False
        while stack:
            path, waiting = stack[-1]
            following = next((p for p in waiting if p not in state), None)
            if following is None:
                stack.pop()
                state[path] = True
                order.append(path)
            else:
                state[following] = False
                found = resolve.imports(following, texts[following], languages[following])
                stack.append((following, found))
    return order


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
