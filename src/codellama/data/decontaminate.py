"""Decontamination: documents that hold passages of benchmarks.

Two views of a text are compared. As words: letters and digits alone, in lower case, so that layout,
punctuation, the case and the underscores of names do not matter. As code: tokens without comments
and strings, each variable replaced by how far back it was used last, so that two programs which
differ in names alone look the same. Benchmarks are cut into passages; a document is a hit where it
holds a given share of the n-grams of one passage.

In: benchmark files and a document's text. Out: `Hits`, which name the benchmarks.
"""

from __future__ import annotations

import builtins
import json
import keyword
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codellama.data.benchmarks import benchmark_files, benchmark_texts
from codellama.recipe import Benchmarks

PASSAGE_WORDS = 100
PASSAGE_TOKENS = 160
MIN_WORDS = 5  # letters in an n-gram of words: tables of numbers are alike everywhere
MIN_DISTINCT = 7  # keywords, attributes and built-in names in an n-gram of code
FILTER_BITS = 24  # one byte each; a set of 10^6 n-grams lets 6% of others through

# Words of licence texts, which files of benchmarks carry, too.
_LICENCE_WORDS = frozenset(
    b"""licence license licensed licenses licensee warranties warranty copyright copyrighted
    sublicense merchantability redistribution redistributions noninfringement permission
    distributed hereby granted obtaining restriction limitation applicable redistribute tort
    exemplary consequential liability""".split()
)
_LOWER = bytes(
    ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else i if i >= 128 else 32
    for i in range(256)
)
_WORD = re.compile(rb"[0-9A-Za-z\x80-\xff]+")
_COMMENT = re.compile(
    r"\"\"\".*?\"\"\"|'''.*?'''|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|(?:#|//)[^\n]*",
    re.DOTALL,
)
# Without parentheses, which many a formatter adds or takes away.
_TOKEN = re.compile(r"[^\W\d]\w*|\d[\w.]*|[^\s\w()]")
_FIXED = frozenset(keyword.kwlist) | frozenset(dir(builtins))
# Of other languages; attributes (behind a dot) are never variables.
_FIXED |= frozenset(
    """this new int void public static const let var function char float double bool boolean string
    String null true false else switch case struct self std vector auto""".split()  # noqa: SIM905
)


class Hits(NamedTuple):
    """What of the benchmarks a document holds."""

    benchmarks: tuple[str, ...]
    spans: list[tuple[int, int]]
    """[begin, end) of UTF-8 bytes, sorted."""


class BlockList:
    """All passages of the benchmarks, ready to be looked for."""

    def __init__(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        self._words = _View("words", arrays, facts["ngram"], facts["names"])
        self._code = _View("code", arrays, facts["code_ngram"], facts["code_names"])
        self._ids = {word.encode(): n for n, word in enumerate(facts["vocabulary"], start=1)}
        self._facts = facts
        self.benchmarks: dict[str, dict[str, int]] = facts["benchmarks"]
        """For each benchmark how many texts, passages, and texts that are too short to be found."""

    def find(self, text: str, is_code: bool) -> Hits:
        """The benchmarks that a text holds passages of."""
        coverage, content, ids = self._facts["coverage"], text.encode("utf-8", "replace"), self._ids
        words = np.array([ids.get(w, 0) for w in content.translate(_LOWER).split()], np.int64)
        hits = self._words.hits(*_word_grams(words, self._words.n), coverage)
        names, spans = self._words.located(hits, _WORD.finditer(content) if hits else ())
        if is_code:
            hits = self._code.hits(
                *_code_grams(code_tokens(text), self._code.n, self._code), coverage
            )
            tokens = _TOKEN.finditer(_without_comments(text)) if hits else ()
            more, characters = self._code.located(hits, tokens)
            names |= more
            spans += [(len(text[:a].encode()), len(text[:b].encode())) for a, b in characters]
        return Hits(tuple(sorted(names)), sorted(set(spans)))

    def save(self, path: Path) -> None:
        """Write a file that `load` reads; it holds nothing that could be executed."""
        views = (self._words, self._code)
        arrays = {f"{v.name}_{k}": getattr(v, k) for v in views for k in _View.FIELDS}
        facts = np.frombuffer(json.dumps(self._facts).encode(), np.uint8)
        with path.open("wb") as file:
            np.savez(file, facts=facts, **arrays)

    @staticmethod
    @lru_cache(maxsize=2)
    def load(path: Path) -> BlockList:
        """Read what `save` wrote; each process does it once."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return BlockList(arrays, json.loads(arrays.pop("facts").tobytes()))


class _View:
    """The n-grams of all passages in one of the two views."""

    FIELDS = ("grams", "passages", "sizes", "shapes")

    def __init__(
        self, name: str, arrays: dict[str, np.ndarray], n: int, benchmarks: list[str]
    ) -> None:
        self.name, self.n, self._benchmarks = name, n, benchmarks  # of each passage
        self.grams = arrays[f"{name}_grams"]  # uint64, sorted
        self.passages = arrays[f"{name}_passages"]  # the passage of each
        self.sizes = arrays[f"{name}_sizes"]  # distinct n-grams of each passage
        self.shapes = arrays[f"{name}_shapes"]  # uint64: beginnings of the n-grams of code
        self._filter = _filter(self.grams)
        self.shape_filter = _filter(self.shapes)

    def hits(self, grams: np.ndarray, at: np.ndarray, coverage: float) -> list[tuple[int, int]]:
        """(passage, place in the document) for every n-gram of every passage that is covered."""
        likely = self._filter[grams >> np.uint64(64 - FILTER_BITS)]
        grams, at = grams[likely], at[likely]
        begin = np.searchsorted(self.grams, grams)
        end = np.searchsorted(self.grams, grams, side="right")
        places: dict[int, dict[int, int]] = {}
        for first, last, gram, place in zip(begin, end, grams, at, strict=True):
            for passage in self.passages[first:last]:
                places.setdefault(int(passage), {})[int(gram)] = int(place)
        return [
            (passage, place)
            for passage, found in places.items()
            if len(found) >= coverage * self.sizes[passage]
            for place in found.values()
        ]

    def located(
        self, hits: list[tuple[int, int]], parts: Iterable[re.Match[Any]]
    ) -> tuple[set[str], list[tuple[int, int]]]:
        """The benchmarks of the hits, and where their n-grams stand; parts: words or tokens."""
        bounds = [part.span() for part in parts]
        spans = [(bounds[place][0], bounds[place + self.n - 1][1]) for _, place in hits]
        return {self._benchmarks[passage] for passage, _ in hits}, spans


def _filter(grams: np.ndarray) -> np.ndarray:
    bits = np.zeros(1 << FILTER_BITS, bool)
    bits[grams >> np.uint64(64 - FILTER_BITS)] = True
    return bits


def _factors(n: int) -> np.ndarray:
    factors = np.random.default_rng(1).integers(1, 1 << 63, n, dtype=np.uint64)
    return factors * np.uint64(2) + np.uint64(1)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Spread what the sums hold over the upper bits, which the filter looks at."""
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return hashes ^ (hashes >> np.uint64(29))


def _sums(values: np.ndarray, at: np.ndarray, factors: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(at), np.uint64)
    for offset, factor in enumerate(factors):
        sums += values[at + offset] * factor
    return _mixed(sums)


def _word_grams(ids: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and places of all n-grams without an unknown word (id 0)."""
    n_unknown = np.r_[0, np.cumsum(ids == 0)]
    at = np.flatnonzero(n_unknown[n:] == n_unknown[:-n]) if len(ids) >= n else np.zeros(0, np.int64)
    values = _mixed(ids.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93))
    return _sums(values, at, _factors(n)), at


class CodeTokens(NamedTuple):
    """Tokens as numbers: of a variable how far back it stood last, of others a hash."""

    values: np.ndarray  # uint64
    distance: np.ndarray  # int64; -1 where the token is no variable
    before: np.ndarray  # int64; of a fixed name its last place or -1, of other tokens far ahead


def code_tokens(text: str) -> CodeTokens:
    """The code of a text, in any language, as tokens whose variables have no names."""
    tokens = _TOKEN.findall(_without_comments(text))
    last: dict[str, int] = {}
    n = len(tokens)
    fixed, distance, earlier = [0] * n, [-1] * n, [1 << 60] * n
    before = ""
    for i, token in enumerate(tokens):
        is_word = token[0].isalnum() or token[0] == "_"
        if is_word and before != "." and token not in _FIXED and not token[0].isdigit():
            distance[i] = i - last[token] if token in last else 1 << 30
            last[token] = i
        else:
            fixed[i] = _token_hash(token)
            if is_word and not token[0].isdigit():
                earlier[i] = last.get(token, -1)
                last[token] = i
        before = token
    return CodeTokens(
        np.array(fixed, np.uint64), np.array(distance, np.int64), np.array(earlier, np.int64)
    )


@lru_cache(maxsize=1 << 16)
def _token_hash(token: str) -> int:
    return int.from_bytes(blake2b(token.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _without_comments(text: str) -> str:
    """Blanks in place of comments and strings, so that everything else keeps its place."""
    return _COMMENT.sub(lambda found: " " * len(found[0]), text)


SHAPE_TOKENS = 12


def _code_grams(tokens: CodeTokens, n: int, view: _View | None) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and places of n-grams; with a view only of those that begin like one of its own."""
    n_windows = len(tokens.values) - n + 1
    if n_windows <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    at = np.arange(n_windows)
    factors = _factors(n)
    if view is not None:
        shapes = _sums(tokens.values, at, factors[:SHAPE_TOKENS])
        at = at[view.shape_filter[shapes >> np.uint64(64 - FILTER_BITS)]]
    sums = np.zeros(len(at), np.uint64)
    for offset, factor in enumerate(factors):
        distance = tokens.distance[at + offset]
        # A variable that stood last before the n-gram begins is new to it.
        seen = np.where(distance > offset, 0, distance).astype(np.uint64)
        sums += np.where(distance < 0, tokens.values[at + offset], seen) * factor
    return _mixed(sums), at


def build_block_list(settings: Benchmarks) -> BlockList:
    """Read all benchmark files.

    Raises:
        ValueError: a path does not exist or a file cannot be read.
    """
    vocabulary: dict[bytes, int] = {}
    grams: dict[str, list[np.ndarray]] = {"words": [], "code": []}  # of each passage
    names: dict[str, list[str]] = {"words": [], "code": []}
    shapes = [np.zeros(0, np.uint64)]
    benchmarks: dict[str, dict[str, int]] = {}
    for file in benchmark_files(settings.paths):
        name = f"{file.parent.name}/{file.name}"
        count = benchmarks.setdefault(name, {"n_texts": 0, "n_passages": 0, "n_too_short": 0})
        for text in dict.fromkeys(benchmark_texts(file)):
            words = list(_word_passages(text, settings.ngram, vocabulary))
            code = list(_code_passages(text, settings.code_ngram))
            grams["words"] += words
            grams["code"] += [found for found, _ in code]
            shapes += [beginnings for _, beginnings in code]
            names["words"] += [name] * len(words)
            names["code"] += [name] * len(code)
            count["n_texts"] += 1
            count["n_passages"] += len(words) + len(code)
            count["n_too_short"] += not words and not code
    arrays: dict[str, np.ndarray] = {}
    for view, passages in grams.items():
        flat = np.concatenate([*passages, np.zeros(0, np.uint64)]).astype(np.uint64)
        sizes = np.array([len(passage) for passage in passages], np.int64)
        order = np.argsort(flat, kind="stable")
        arrays[f"{view}_grams"], arrays[f"{view}_sizes"] = flat[order], sizes
        arrays[f"{view}_passages"] = np.repeat(np.arange(len(sizes)), sizes)[order]
        arrays[f"{view}_shapes"] = np.zeros(0, np.uint64)
    arrays["code_shapes"] = np.unique(np.concatenate(shapes))
    facts = {
        "vocabulary": [word.decode("utf-8", "replace") for word in vocabulary],
        "names": names["words"],
        "code_names": names["code"],
        "benchmarks": benchmarks,
        **settings.model_dump(include={"ngram", "code_ngram", "coverage"}),
    }
    return BlockList(arrays, facts)


def _word_passages(text: str, n: int, vocabulary: dict[bytes, int]) -> Iterator[np.ndarray]:
    """Distinct n-grams of each passage, without those that any file may hold."""
    words = text.encode("utf-8", "replace").translate(_LOWER).split()
    n_passages = max(1, len(words) // PASSAGE_WORDS)
    for part in range(n_passages):
        passage = words[len(words) * part // n_passages : len(words) * (part + 1) // n_passages]
        ids = np.array([vocabulary.setdefault(w, len(vocabulary) + 1) for w in passage], np.int64)
        grams, at = _word_grams(ids, n)
        lettered = np.r_[0, np.cumsum([not word.isdigit() and len(word) > 1 for word in passage])]
        legal = np.r_[0, np.cumsum([word in _LICENCE_WORDS for word in passage])]
        # Also between words of licences: "you may not use this file except in compliance with".
        near = legal[np.minimum(at + 2 * n, len(ids))] - legal[np.maximum(at - n, 0)]
        special = (lettered[at + n] - lettered[at] >= MIN_WORDS) & (near == 0)
        if special.any():
            yield np.unique(grams[special])


def _code_passages(text: str, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Distinct n-grams of each passage that say more than the shape of a loop, and their heads."""
    tokens = code_tokens(text)
    grams, at = _code_grams(tokens, n, None)
    heads = _sums(tokens.values, at, _factors(n)[:SHAPE_TOKENS])
    n_distinct = np.zeros(len(at), np.int64)
    for offset in range(n):
        n_distinct += tokens.before[at + offset] < at
    special = n_distinct >= MIN_DISTINCT
    n_passages = max(1, len(tokens.values) // PASSAGE_TOKENS)
    for part in range(n_passages):
        begin, end = (len(at) * k // n_passages for k in (part, part + 1))
        chosen = np.flatnonzero(special[begin:end]) + begin
        if len(chosen):
            yield np.unique(grams[chosen]), heads[chosen]


_CONTINUES = re.compile(rb"[\s})\]]|(?:else|elif|except|finally|\"\"\"|''')\b|$")


def cut(text: str, spans: list[tuple[int, int]], is_code: bool) -> str:
    """The text without the top-level statements, or paragraphs, that the spans of bytes touch."""
    lines = text.encode().splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    begins: list[int] = []  # of each block its first line
    for number, line in enumerate(lines):
        if is_code:
            starts = not _CONTINUES.match(line)
            if starts and number and lines[number - 1].startswith((b"@", b"#", b"//")):
                starts = False  # a decorator or comment belongs to what follows
        else:
            starts = bool(line.strip()) and not (number and lines[number - 1].strip())
        if starts or not number:
            begins.append(number)
    block_of = np.searchsorted(begins, np.arange(len(lines)), side="right")
    gone: set[int] = set()
    for begin, end in spans:
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        gone.update(int(block) for block in block_of[first : last + 1])
    return b"".join(
        line for line, block in zip(lines, block_of, strict=True) if block not in gone
    ).decode()
