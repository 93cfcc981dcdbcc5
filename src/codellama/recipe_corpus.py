"""The corpus sections of a recipe: sources, filters, duplicates, benchmarks, and the split.

`recipe` has the rest, and is what others import; this file is apart for its length.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class Source(Section):
    """One place that documents come from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["stdlib", "installed", "pypi", "tree", "git", "archive", "parquet", "jsonl"] = (
        "tree"
    )
    """`stdlib`: this interpreter's library; `installed`: its site-packages; `pypi`: `packages`
    fetched by name with pip, never installed or run; `tree`: a folder; `git`: a repository, bare or
    not, as of its last commit; `archive`: .tar.gz, .tar.zst, .zip, .whl and their relatives;
    `parquet` and `jsonl` (plain, .gz, .zst): one document a row."""
    path: str | None = None
    """A folder for `tree` and `git`; else a file, a pattern such as `data/*.jsonl.gz`, or a URL
    that begins with s3://, gs://, hf:// or https://."""
    packages: tuple[str, ...] = ()
    """Packages to take; empty means all of them (not accepted by `pypi`)."""
    languages: tuple[str, ...] = ("python",)
    """What to take of a source of code; `all` is every language that is not data."""
    content: Literal["code", "code-text", "text"] = "code"
    """What the source holds: code (of which prose such as README.md is text about code), text about
    code, or natural language; the latter two are taken whatever their language."""
    columns: dict[str, str | tuple[str, ...]] = {"text": "text"}
    """Columns of a table for text, path, repository, language and licence; several are joined by an
    empty line, as for questions with answers."""
    licence: str = "unknown"
    """What holds where a document or its repository does not say."""
    docstrings: bool = False
    """Take long docstrings and comments of Python files as text about code, too."""

    @model_validator(mode="after")
    def _path_matches_kind(self) -> Source:
        if (self.kind not in ("stdlib", "installed", "pypi")) != (self.path is not None):
            raise ValueError(
                '"path" is needed by tree, git, archive, parquet and jsonl, and by no other kind'
            )
        if self.kind == "pypi" and not self.packages:
            raise ValueError('kind = "pypi" needs "packages", a list of names')
        known = ("text", "path", "repository", "language", "licence")
        if wrong := set(self.columns) - set(known) or {"text"} - set(self.columns):
            raise ValueError(
                f"columns: {min(wrong)!r}: expected text and any of {', '.join(known)}"
            )
        return self


class Filters(Section):
    """Thresholds of the corpus filters; a document outside them is dropped with that reason."""

    min_bytes: Positive = 100  # shorter files are empty __init__.py and stubs
    max_bytes: Positive = 1_000_000  # larger ones are almost always generated tables
    # These three are the limits of The Stack's `basic` filter, after Codex's.
    max_line_chars: Positive = 1_000  # one such line means data or minified code
    max_mean_line_chars: Positive = 100  # of Python's library, 99% of the files are below 49
    min_alphanumeric_share: Share = 0.25  # below are drawings and tables; there, 99% are above 0.43
    max_data_share: Share = 0.5  # share of characters inside hexadecimal or base64 runs
    parse_python: bool = True
    """Drop Python that this interpreter does not accept, such as Python 2 and templates."""
    permissive_only: bool = True
    """Drop documents whose licence is known and is not permissive, and those without a licence."""
    allowed_licences: tuple[str, ...] = ()
    """SPDX names that are accepted besides the permissive ones, such as CC-BY-SA-4.0 for text."""
    redact: bool = False
    """Replace keys, tokens, passwords, e-mail and IP addresses by <KEY>, <EMAIL> and so on."""


class NearDuplicates(Section):
    """Documents that resemble each other; of each group of them one is kept."""

    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Jaccard similarity of the sets of n-grams from which two documents are alike. Of its estimate
    twice the standard deviation less is enough, 0.75 here: else half of those at 0.8 are missed."""
    ngram: Positive = 5  # words; shorter ones make all Python alike, longer ones break at each edit
    n_hashes: Positive = 256  # the estimate's standard deviation at 0.8 is then 0.025
    n_bands: Positive = 32  # of 8 hashes: two documents alike by 0.8 share one with p = 0.997

    @model_validator(mode="after")
    def _bands_are_whole(self) -> NearDuplicates:
        if self.n_hashes % self.n_bands:
            raise ValueError(f"n_hashes = {self.n_hashes} is no multiple of n_bands")
        return self


class Benchmarks(Section):
    """Test material that must not be trained on."""

    paths: tuple[str, ...] = Field(min_length=1)
    """Files or folders: .jsonl, .json, .csv, .txt, also with .gz; every text in them counts."""
    action: Literal["drop", "cut"] = "drop"
    """Drop a document with a hit, or cut the statements and paragraphs that hold it."""
    ngram: Annotated[int, Field(ge=4)] = 10  # words, as in DeepSeek-Coder's filter
    code_ngram: Annotated[int, Field(ge=10)] = 30
    """Tokens of code whose names are not looked at; shorter runs are common in any program."""
    coverage: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the n-grams of a passage (100 words) that a document holds where it is a hit."""


class Corpus(Section):
    """What `prepare` reads and how it splits the result."""

    sources: tuple[Source, ...] = Field(min_length=1)
    filters: Filters = Filters()
    near_duplicates: NearDuplicates | None = None
    """None finds exact duplicates only; an empty table means the defaults."""
    against: tuple[str, ...] = ()
    """Other corpora: what duplicates one of their documents is dropped."""
    benchmarks: Benchmarks | None = None
    validation_share: Share = 0.02
    """Share of packages (by hash of the name) that are held out whole."""
    hold_out: tuple[str, ...] = ()
    """Packages that are always held out, whatever their hash."""
    keep_rejects: bool = False
    """Write what was dropped, with the reason, into rejects.parquet beside the shards."""
    repositories: bool = False
    """Also write a corpus of whole repositories in dependency order, for collections of these."""
    seed: int = 0

    @model_validator(mode="after")
    def _names_differ(self) -> Corpus:
        names = [source.name for source in self.sources]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sources: the name {min(twice)!r} is there twice")
        return self
