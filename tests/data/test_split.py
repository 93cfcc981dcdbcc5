from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trees import make_recipe

from codellama.data.split import Rows, assign_splits, unit_hash


def columns(*files: tuple[str, str | None]) -> Rows:
    """Rows from (repository, key); a key of None is a file dropped by a filter."""
    keys = [(key or "").encode().ljust(16, b"\0") for _, key in files]
    return Rows(
        source=np.zeros(len(files), np.int32),
        repository=np.array([repository for repository, _ in files], object),
        reason=np.array(["too small" if key is None else None for _, key in files], object),
        key=np.array(keys).astype("V16"),
        sha256=np.array([f"sha-{key}-{n}" for n, (_, key) in enumerate(files)], object),
        n_bytes=np.ones(len(files), np.int64),
        place=np.arange(len(files)),
    )


def split(rows: Rows, **corpus: Any) -> list[str | None]:
    found, _ = assign_splits(make_recipe(Path("work"), Path("tree"), **corpus).corpus, rows)
    return [(None, "train", "validation")[number + 1] for number in found.tolist()]


def test_named_packages_are_held_out_whole_whatever_their_spelling() -> None:
    rows = columns(("a", "1"), ("zope-interface", "2"), ("zope-interface", "3"), ("b", None))
    found = split(rows, hold_out=["Zope.Interface"], validation_share=0.0)
    assert found == ["train", "validation", "validation", None]


def test_about_the_given_share_of_packages_is_held_out_by_name() -> None:
    names = [f"package-{n}" for n in range(400)]
    rows = columns(*((name, f"{name}{part}") for name in names for part in "ab"))
    found = split(rows, validation_share=0.1)
    held = {name for name, s in zip(rows.repository, found, strict=True) if s == "validation"}
    assert 25 <= len(held) <= 55
    for index in range(0, len(found), 2):
        assert found[index] == found[index + 1]  # never half a package
    other = split(columns(*((name, name) for name in names)), validation_share=0.1, seed=1)
    assert other != found[::2]


def test_the_standard_library_is_not_held_out_by_hash() -> None:
    rows = columns(*(("cpython", str(n)) for n in range(6)), ("a", "x"), ("b", "y"))
    assert split(rows, validation_share=1.0) == ["train"] * 6 + ["validation"] * 2


def test_a_text_that_is_held_out_is_never_trained_on() -> None:
    rows = columns(("a", "same"), ("held", "same"), ("b", "same"), ("b", "other"))
    found = split(rows, hold_out=["held"], validation_share=0.0)
    assert found == [None, "validation", None, "train"]
    assert rows.reason.tolist() == ["duplicate", None, "duplicate", None]


def test_of_duplicates_in_training_the_first_stays() -> None:
    rows = columns(("a", None), ("b", "same"), ("a", "same"), ("held", "x"))
    found = split(rows, hold_out=["held"], validation_share=0.0)
    assert found == [None, "train", None, "validation"]
    assert rows.reason.tolist() == ["too small", None, "duplicate", None]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("n_files", [2, 3, 50])
def test_one_package_is_split_by_file_and_neither_side_is_empty(share: float, n_files: int) -> None:
    rows = columns(*(("only", str(n)) for n in range(n_files)))
    found = split(rows, validation_share=share)
    n_held = found.count("validation")
    assert n_held == min(max(1, round(share * n_files)), n_files - 1)
    assert n_held + found.count("train") == n_files


def test_a_single_document_is_trained_on() -> None:
    assert split(columns(("only", "1"), ("only", None)), validation_share=1.0) == ["train", None]


def test_what_stands_for_a_duplicate() -> None:
    rows = columns(("a", "same"), ("held", "same"), ("b", "other"), ("b", "same"))
    corpus = make_recipe(Path("work"), Path("tree"), hold_out=["held"]).corpus
    assert assign_splits(corpus, rows)[1].tolist() == [1, 1, 2, 1]


def test_nothing_kept_and_everything_held_out() -> None:
    assert split(columns(("a", None))) == [None]
    assert split(columns(("a", "1"), ("a", "2")), hold_out=["a"]) == ["validation"] * 2


def test_unit_hash_is_uniform_and_depends_on_the_seed() -> None:
    values = [unit_hash(0, str(n)) for n in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.03
    assert unit_hash(0, "x") != unit_hash(1, "x")
