import errno
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trees import make_recipe, program, write_tree, write_wheel

from codellama.cli import run_command
from codellama.data import listing, prepare, shuffle, staging
from codellama.data.corpus import CorpusReader
from codellama.data.prepare import plan_corpus, prepare_corpus
from codellama.recipe import load_recipe

FILES: dict[str, str | bytes] = {f"pkg{n % 8}/module_{n}.py": program(f"f{n}") for n in range(40)}
JUNK: dict[str, str | bytes] = {
    "pkg0/binary.py": b"\x7fELF\0\0" * 50,
    "pkg0/latin.py": b"# caf\xe9 " + program("latin").encode(),
    "pkg1/small.py": "",
    "pkg1/z_copy.py": program("f1").replace("\n", "\r\n"),
    "pkg2/_vendor/copied.py": program("vendored"),
    "pkg2/bad.py": program("bad") + "def f(:\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", FILES | JUNK)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_from_a_folder_to_a_corpus(tree: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "work", tree, hold_out=["pkg3"], validation_share=0.0)
    folder = prepare_corpus(recipe)
    assert folder == recipe.corpus_dir
    train, validation = CorpusReader(folder, "train"), CorpusReader(folder, "validation")
    held = {text for path, text in FILES.items() if path.startswith("pkg3/")}
    assert set(validation) == held
    assert set(train) == set(FILES.values()) - held
    assert len(train) + len(validation) == len(FILES)
    text = validation.text(0)
    assert validation.row(0) == {
        "text": text,
        "source": "tree",
        "repository": "pkg3",
        "path": validation.row(0)["path"],
        "language": "python",
        "kind": "code",
        "licence": "MIT",
        "n_bytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "split": "validation",
    }
    found = manifest(folder)
    assert found["kind"] == "corpus"
    assert found["n_documents"] == {"train": 35, "validation": 5}
    assert found["n_bytes"]["validation"] == sum(len(text.encode()) for text in held)
    assert {reason: drop["n"] for reason, drop in found["dropped"].items()} == {
        "vendored": 1,
        "too small": 1,
        "not UTF-8": 1,
        "binary": 1,
        "does not parse": 1,
        "duplicate": 1,
    }
    assert found["dropped"]["binary"]["examples"] == ["pkg0/binary.py"]
    assert found["sources"]["tree"] == {
        "n_files": 46,
        "n_documents": 40,
        "n_bytes": sum(found["n_bytes"].values()),
    }
    assert found["licences"]["MIT"]["n_documents"] == 40
    assert found["held_out"] == ["pkg3"]
    assert found["held_out_by"] == "package"
    assert sum(shard["rows"] for shard in found["shards"]) == 40
    assert str(tree) not in str([train.row(index) for index in range(len(train))])


def test_training_order_is_mixed_and_depends_on_the_seed(tree: Path, tmp_path: Path) -> None:
    orders = []
    for seed in (0, 1):
        recipe = make_recipe(tmp_path / str(seed), tree, seed=seed, hold_out=["pkg3"])
        reader = CorpusReader(prepare_corpus(recipe), "train")
        orders.append([reader.row(index)["path"] for index in range(len(reader))])
    assert orders[0] != sorted(orders[0])
    assert orders[0] != [path for path in orders[1] if path in orders[0]]


def test_same_inputs_give_the_same_bytes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"near_duplicates": {}}
    one = prepare_corpus(make_recipe(tmp_path / "one", tree, **fields))
    for file in tree.rglob("*.py"):
        os.utime(file, (1, 1))
    # In worker processes this time, in other units, and sorted in several buckets.
    monkeypatch.setattr(prepare, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(listing, "UNIT_FILES", 2)
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 5000)
    monkeypatch.setattr(shuffle, "BUFFER_BYTES", 3000)
    two = prepare_corpus(make_recipe(tmp_path / "two", tree, **fields))
    assert content(one) == content(two)


def test_a_second_run_does_nothing(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path / "work", tree)
    folder = prepare_corpus(recipe)
    before = folder.stat().st_ino, content(folder)
    assert "up to date" not in capsys.readouterr().err
    prepare_corpus(recipe)
    assert "up to date" in capsys.readouterr().err
    assert (folder.stat().st_ino, content(folder)) == before


@pytest.mark.parametrize(
    "change", ["config", "edited", "added", "removed", "shard lost", "manifest"]
)
def test_whatever_changed_leads_to_a_new_corpus(tree: Path, tmp_path: Path, change: str) -> None:
    fields: dict[str, Any] = {"hold_out": ["pkg3"]}
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree, **fields))
    before = content(folder)
    if change == "config":
        fields["seed"] = 5
    elif change == "edited":
        file = tree / "pkg0" / "module_0.py"
        file.write_text(file.read_text().replace("first * 3", "first * 4"))  # same size
    elif change == "added":
        (tree / "pkg0" / "new.py").write_text(program("new"))
    elif change == "removed":
        (tree / "pkg0" / "module_0.py").unlink()
    elif change == "shard lost":
        (folder / "train-00000.parquet").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    prepare_corpus(make_recipe(tmp_path / "work", tree, **fields))
    assert (content(folder) == before) is (change in ("shard lost", "manifest"))
    CorpusReader(folder, "train")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["corpus", "staged"]


def test_empty_corpora_say_what_was_dropped(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"a/x.py": "", "a/y.py": b"\0" * 500})
    with pytest.raises(ValueError, match=r"is empty: of 2 files .*too small: 1, binary: 1"):
        prepare_corpus(make_recipe(tmp_path / "work", tree))
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="is empty: no wanted files"):
        prepare_corpus(make_recipe(tmp_path / "work", tmp_path / "void"))
    with pytest.raises(ValueError, match="no such folder"):
        prepare_corpus(make_recipe(tmp_path / "work", tmp_path / "absent"))
    held = write_tree(tmp_path / "held", {"a/x.py": program("x"), "a/y.py": program("y")})
    with pytest.raises(ValueError, match="hold_out names every package"):
        prepare_corpus(make_recipe(tmp_path / "work", held, hold_out=["a"]))
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["staged"]


def test_licences_that_are_not_permissive_are_left_out(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"free/x.py": program("x"), "free/z.py": program("z")})
    write_tree(tree, {"copyleft/y.py": program("y")}, licence="GNU GENERAL PUBLIC LICENSE")
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree))
    assert manifest(folder)["dropped"] == {"licence": {"n": 1, "examples": ["copyleft/y.py"]}}
    everything = make_recipe(tmp_path / "work", tree, filters={"permissive_only": False})
    assert manifest(prepare_corpus(everything))["licences"]["GPL"]["n_documents"] == 1


def test_a_tree_whose_files_alone_say_their_licence(tmp_path: Path) -> None:
    prose = "What it is for, in many words. " * 3
    header, documented = "# SPDX-License-Identifier: MIT\n", f'"""{(prose + chr(10)) * 12}"""\n'
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.py").write_text(header + documented + program("a"))
    (tree / "b.py").write_text(program("b"))
    (tree / "c.py").write_text(header.replace("MIT", "GPL-2.0-only") + program("c"))
    sources = [{"name": "tree", "path": str(tree), "docstrings": True}]
    folder = prepare_corpus(make_recipe(tmp_path / "work", sources))
    found = manifest(folder)
    assert {name: row["n_documents"] for name, row in found["licences"].items()} == {"MIT": 2}
    assert found["dropped"]["licence"] == {"n": 2, "examples": ["tree/b.py", "tree/c.py"]}


def test_a_large_notebook_is_too_large(tree: Path, tmp_path: Path) -> None:
    cells = [{"cell_type": "markdown", "source": ["Some words. "] * 300}]
    (tree / "pkg0/n.ipynb").write_text(json.dumps({"cells": cells}))
    sources = [{"name": "tree", "path": str(tree), "languages": ["notebook"]}]
    recipe = make_recipe(tmp_path / "work", sources, filters={"max_bytes": 2000})
    with pytest.raises(ValueError, match=r"none was kept \(too large: 1\)"):
        prepare_corpus(recipe)


def test_an_empty_source_beside_others_is_not_fatal(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    (tmp_path / "void.jsonl").write_text("")
    sources = [
        {"name": "tree", "path": str(tree)},
        {"name": "folder", "path": str(tmp_path / "void")},
        {"name": "table", "kind": "jsonl", "path": str(tmp_path / "void.jsonl")},
        {"name": "pattern", "kind": "jsonl", "path": str(tmp_path / "*.absent")},
    ]
    found = manifest(prepare_corpus(make_recipe(tmp_path / "work", sources)))
    assert sum(found["n_documents"].values()) == len(FILES)
    assert [found["sources"][name]["n_files"] for name in ("folder", "table", "pattern")] == [0] * 3
    assert list(found["inputs"]["unavailable"]) == ["pattern"]


@pytest.mark.parametrize("fault", ["refused", "broken"])
def test_what_the_network_failed_on_is_tried_again(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    rows = "".join(json.dumps({"text": program(f"far{n}")}) + "\n" for n in range(50)).encode()
    url, faults = "https://somewhere.example/rows.jsonl", [fault]

    class Remote(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if faults and self.tell() > len(rows) // 2:
                raise OSError(errno.ECONNRESET, "connection reset")
            return super().readinto(buffer)

    def open_file(*_: object) -> io.BytesIO:
        if faults == ["refused"]:
            raise OSError(errno.ECONNREFUSED, "connection refused")
        return Remote(rows)

    class Listed:
        def select(self, *_: str) -> Any:
            return self

        def to_pydict(self) -> dict[str, list[Any]]:
            return {"path": [url], "size": [len(rows)]}

    monkeypatch.setattr(daft, "open_file", open_file)
    monkeypatch.setattr(daft, "from_glob_path", lambda _: Listed())
    sources = [{"name": "tree", "path": str(tree)}, {"name": "far", "kind": "jsonl", "path": url}]
    recipe = make_recipe(tmp_path / "work", sources, filters={"permissive_only": False})
    found = manifest(prepare_corpus(recipe))
    assert found["dropped"]["unavailable"]["n"] == 1
    assert "damaged archive" not in found["dropped"]
    assert [row["to_read_bytes"] for row in plan_corpus(recipe)] == [0, len(rows)]
    faults.clear()
    found = manifest(prepare_corpus(recipe))
    assert found["sources"]["far"]["n_documents"] == 50
    assert "unavailable" not in found["dropped"]
    capsys.readouterr()
    prepare_corpus(recipe)
    assert "up to date" in capsys.readouterr().err


def test_unreadable_files_are_counted(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tree / "pkg0" / "fifo.py")
    (tree / "pkg0" / "dangling.py").symlink_to("absent")
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree))
    drop = manifest(folder)["dropped"]["unreadable"]
    assert drop == {"n": 2, "examples": ["pkg0/dangling.py", "pkg0/fifo.py"]}


def test_a_held_out_package_is_trained_on_through_no_other_door(tmp_path: Path) -> None:
    """Copies of a held-out package elsewhere: vendored, renamed, in a second source, CRLF."""
    secret = {f"m{n}.py": program(f"secret{n}") for n in range(5)}
    tree = write_tree(tmp_path / "tree", FILES)
    write_tree(tree, {f"secret/{name}": text for name, text in secret.items()})
    write_tree(tree, {f"pkg1/_vendor/secret/{name}": text for name, text in secret.items()})
    copies = {f"pkg0/copy_{n}": text.replace("\n", "\r\n") for n, text in secret.items()}
    write_tree(tree, copies)
    write_wheel(
        tmp_path / "work" / "sources", "Secret", {f"secret/{n}": t for n, t in secret.items()}
    )
    sources = [
        {"name": "tree", "path": str(tree)},
        {"name": "pypi", "kind": "pypi", "packages": ["Secret"]},
    ]
    recipe = make_recipe(tmp_path / "work", sources, hold_out=["secret"], validation_share=0.0)
    folder = prepare_corpus(recipe)
    assert sorted(CorpusReader(folder, "validation")) == sorted(secret.values())
    assert not any("secret" in text for text in CorpusReader(folder, "train"))
    assert manifest(folder)["inputs"]["archives"] == ["Secret-1.0-py3-none-any.whl"]


def test_packages_that_cannot_be_had_are_in_the_manifest(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    sources = [
        {"name": "tree", "path": str(tree)},
        {"name": "pypi", "kind": "pypi", "packages": ["no-such-thing"]},
    ]
    folder = prepare_corpus(make_recipe(tmp_path / "work", sources))
    assert list(manifest(folder)["inputs"]["unavailable"]) == ["pypi/no-such-thing"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_while_writing_leaves_the_previous_corpus(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree))
    before = content(folder)
    whole = shuffle.ShardWriter.add

    def fail(self: Any, table: Any) -> None:
        whole(self, table.slice(0, 10))
        raise error

    monkeypatch.setattr(shuffle.ShardWriter, "add", fail)
    expected = r"corpus: could not write .*No space left" if isinstance(error, OSError) else None
    with pytest.raises(type(error), match=expected):
        prepare_corpus(make_recipe(tmp_path / "work", tree, seed=9))
    assert content(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["corpus", "staged"]


IN_ANOTHER_PROCESS = """
import json, os, resource, signal, sys
from codellama.data import corpus, prepare
from codellama.recipe import Recipe

recipe, fault = Recipe.model_validate_json(sys.argv[1]), sys.argv[2]
if fault == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
elif fault == "killed":
    corpus.ShardWriter.close = lambda self: os.kill(os.getpid(), signal.SIGKILL)
try:
    prepare.prepare_corpus(recipe)
except OSError as error:
    print(f"OSError: {error}")
"""


def run_in_process(recipe: Any, fault: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, recipe.model_dump_json(), fault]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    # Text that does not compress, so that the shard passes the limit of 8 kB a file.
    files: dict[str, str | bytes] = {}
    for n in range(60):
        noise = "".join(
            hashlib.sha512(f"{n}.{i}".encode()).hexdigest()[:50] + " " for i in range(9)
        )
        files[f"pkg{n % 4}/m{n}.py"] = program(f"f{n}") + f'"""{noise}"""\n'
    recipe = make_recipe(tmp_path / "work", write_tree(tmp_path / "tree", files))
    done = run_in_process(recipe, "full")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"OSError: {recipe.corpus_dir}: could not write the corpus: ")
    assert "File too large" in line
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "work" / "staged").iterdir()) == []


def test_killed_while_writing_then_run_again(tree: Path, tmp_path: Path) -> None:
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree))
    before = content(folder)
    recipe = make_recipe(tmp_path / "work", tree, seed=9)
    assert run_in_process(recipe, "killed").returncode == -9
    assert content(folder) == before
    prepare_corpus(recipe)
    assert content(folder) == content(prepare_corpus(make_recipe(tmp_path / "fresh", tree, seed=9)))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["corpus", "staged"]


def test_two_processes_do_not_write_one_corpus(tree: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "work", tree)
    recipe.work.mkdir()
    descriptor = os.open(recipe.work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is preparing"):
        prepare_corpus(recipe)
    os.close(descriptor)
    prepare_corpus(recipe)


def test_an_interrupted_run_goes_on_where_it_stopped(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "UNIT_FILES", 2)
    n_done = 0
    whole = prepare.stage_unit

    def stop(*arguments: Any) -> None:
        nonlocal n_done
        if n_done == 3:
            raise KeyboardInterrupt
        whole(*arguments)
        n_done += 1

    monkeypatch.setattr(prepare, "stage_unit", stop)
    recipe = make_recipe(tmp_path / "work", tree)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(recipe)
    staged = {path.name: path.stat().st_ino for path in (tmp_path / "work/staged").iterdir()}
    assert len(staged) == 3
    monkeypatch.setattr(prepare, "stage_unit", whole)
    folder = prepare_corpus(recipe)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "work/staged").iterdir()}
    assert after.items() > staged.items()
    assert content(folder) == content(prepare_corpus(make_recipe(tmp_path / "fresh", tree)))


def test_large_files_are_worked_off_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as from whole files, by two processes, the first of which is interrupted."""
    texts = [program(f"f{n}") for n in range(60)]
    rows = [{"text": text, "path": f"m{n}.py"} for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    pq.write_table(pa.Table.from_pylist(rows[20:]), tmp_path / "t.parquet", row_group_size=7)
    sources = [
        {"name": kind, "kind": kind, "path": str(next(tmp_path.glob(f"*.{kind}")))}
        for kind in ("jsonl", "parquet")
    ]
    fields: dict[str, Any] = {"near_duplicates": {}, "filters": {"permissive_only": False}}
    monkeypatch.setattr(staging, "BATCH_BYTES", 1)  # row groups of one document, also of none
    whole = prepare_corpus(make_recipe(tmp_path / "whole", sources, **fields))
    monkeypatch.setattr(listing, "UNIT_BYTES", 2000)
    recipe = make_recipe(tmp_path / "parts", sources, **fields)
    stage, n_calls = prepare.stage_unit, 0

    def stop(*arguments: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            raise KeyboardInterrupt
        stage(*arguments)

    monkeypatch.setattr(prepare, "stage_unit", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(recipe)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "parts/staged").iterdir()}
    assert len(before) == 3
    monkeypatch.setattr(prepare, "IN_PROCESS_BYTES", 0)  # in worker processes from here on
    folder = prepare_corpus(recipe)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "parts/staged").iterdir()}
    assert after.items() > before.items()
    assert len(after) > 10
    assert content(folder) == content(whole)
    assert manifest(folder)["n_documents"] == {"train": 59, "validation": 1}
    assert manifest(folder)["dropped"]["duplicate"]["n"] == 10


def test_a_new_source_leaves_the_others_as_they_are(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = write_tree(tmp_path / "more", {f"new/m{n}.py": program(f"new{n}") for n in range(5)})
    write_tree(more, {"new/copy.py": program("f1") + "# changed a little\n"})
    sources = [{"name": "tree", "path": str(tree)}, {"name": "more", "path": str(more)}]
    fields: dict[str, Any] = {"near_duplicates": {}, "hold_out": ["pkg3"]}
    recipe = make_recipe(tmp_path / "work", sources[:1], **fields)
    before = CorpusReader(prepare_corpus(recipe), "train")
    old = set(before)
    names: list[str] = []
    whole = prepare.stage_unit

    def watch(unit: Any, *arguments: Any) -> None:
        names.append(unit.source)
        whole(unit, *arguments)

    monkeypatch.setattr(prepare, "stage_unit", watch)
    assert [
        row["to_read_bytes"] > 0
        for row in plan_corpus(make_recipe(tmp_path / "work", sources, **fields))
    ] == [False, True]
    folder = prepare_corpus(make_recipe(tmp_path / "work", sources, **fields))
    assert set(names) == {"more"}
    new = CorpusReader(folder, "train")
    assert set(new) - old == {program(f"new{n}") for n in range(5)}
    assert old <= set(new)
    (example,) = manifest(folder)["dropped"]["near duplicate"]["examples"]
    assert example == "new/copy.py (like pkg1/module_1.py)"
    assert manifest(folder)["cluster_sizes"] == {"3": 1}


def test_a_dry_run_says_what_is_left_and_writes_nothing(
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_wheel(tmp_path / "work/sources", "there", {"there/m.py": program("there")})
    (tree / "pkg7/b.txt").write_text("a benchmark")
    (tmp_path / "recipe.toml").write_text(f"""
        name = "test"
        work = "{tmp_path}/work"
        model.name = "tiny"
        stages.code = {{ steps = 1, batch_tokens = 512, micro_batch = 1, peak_lr = 1e-3 }}
        [corpus]
        benchmarks.paths = ["{tree}/pkg7"]
        sources = [
            {{ name = "tree", path = "{tree}" }},
            {{ name = "wheels", kind = "pypi", packages = ["there", "not-fetched"] }}
        ]""")

    def planned() -> list[dict[str, Any]]:
        assert run_command(["prepare", f"{tmp_path}/recipe.toml", "--dry-run", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    before = sorted(tmp_path.rglob("*"))
    first, wheels = planned()
    assert sorted(tmp_path.rglob("*")) == before
    n_bytes = sum(file.stat().st_size for file in tree.rglob("*.py"))
    assert first == {
        "source": "tree",
        "kind": "tree",
        "n_units": 2,
        "n_bytes": n_bytes,
        "to_read_bytes": n_bytes,
        "n_other_files": 9,  # licences, and the benchmark
        "unavailable": {},
    }
    assert wheels["n_units"] == 1
    assert wheels["unavailable"] == {"wheels/not-fetched": "could not be fetched"}
    monkeypatch.setattr(listing, "fetch_wheel", listing.cached_wheel)
    prepare_corpus(load_recipe(tmp_path / "recipe.toml"))
    assert [row["to_read_bytes"] for row in planned()] == [0, 0]
    assert run_command(["prepare", f"{tmp_path}/recipe.toml", "--dry-run"]) == 0
    assert "not-fetched" in capsys.readouterr().out


def test_a_new_batch_against_an_existing_corpus(tree: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"near_duplicates": {}, "hold_out": ["pkg3", "other"]}
    first = prepare_corpus(make_recipe(tmp_path / "first", tree, **fields))
    files: dict[str, str | bytes] = {
        "batch/copy.py": program("f1"),
        "batch/near.py": program("f3") + "# changed a little\n",  # of what was held out
        "batch/new.py": program("new"),
        "other/held.py": program("held"),
    }
    batch = write_tree(tmp_path / "batch", files)
    recipe = make_recipe(tmp_path / "second", batch, against=[str(first)], **fields)
    folder = prepare_corpus(recipe)
    assert list(CorpusReader(folder, "train")) == [program("new")]
    dropped = {reason: drop["n"] for reason, drop in manifest(folder)["dropped"].items()}
    assert dropped == {"duplicate": 1, "near duplicate": 1}
    fields["near_duplicates"] = {"ngram": 3}
    other = make_recipe(tmp_path / "second", batch, against=[str(first)], **fields)
    with pytest.raises(ValueError, match="other settings of near_duplicates"):
        prepare_corpus(other)


def test_every_kind_of_source_and_document_in_one_corpus(tmp_path: Path) -> None:
    script = "import { a } from './b.js';\n" + "export const value = a + 1; // code\n" * 6
    notebook = {"cells": [{"cell_type": "markdown", "source": ["Some words. "] * 20}]}
    prose = "How to use it, in many words. " * 12
    documented = f'"""{(prose + chr(10)) * 5}"""\n' + program("documented")
    files: dict[str, str | bytes] = {
        "p/a.py": documented,
        "p/b.ts": script,
        "p/README.md": "# Title\n\n" + prose * 9,  # one line of 3,000 characters
        "p/n.ipynb": json.dumps(notebook),
        "p/run": "#!/bin/sh\n" + "echo hello to everybody here\n" * 8,
        "p/data.json": json.dumps({"key": "value"}) * 20,
        "p/package-lock.json": "{}",
        "p/app.min.js": "var a=1;" * 50,
    }
    tree = write_tree(tmp_path / "tree", files)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"q": f"Question {n}? {prose}", "a": prose * n}) + "\n" for n in (1, 2))
        + "{broken\n"
    )
    sources = [
        {"name": "tree", "path": str(tree), "languages": ["all"], "docstrings": True},
        {
            "name": "answers",
            "kind": "jsonl",
            "path": str(rows),
            "content": "text",
            "columns": {"text": ["q", "a"]},
            "licence": "CC-BY-SA-4.0",
        },
        {"name": "far", "kind": "jsonl", "path": "s3://no-such-bucket-here/*.jsonl"},
    ]
    filters = {"allowed_licences": ["CC-BY-SA-4.0"]}
    folder = prepare_corpus(make_recipe(tmp_path / "work", sources, filters=filters))
    found = manifest(folder)
    paths: dict[str, tuple[str, str]] = {}
    for split in ("train", "validation"):
        reader = CorpusReader(folder, split)  # type: ignore[arg-type]
        for row in map(reader.row, range(len(reader))):
            paths[row["path"]] = row["kind"], row["language"]
    assert paths == {
        "a.py": ("code", "python"),
        "a.py#docstrings": ("code-text", "text"),
        "b.ts": ("code", "typescript"),
        "README.md": ("code-text", "markdown"),
        "n.ipynb": ("code-text", "notebook"),
        "run": ("code", "bash"),
        "rows.jsonl#0": ("text", "text"),
        f"rows.jsonl#{rows.read_text().index(chr(10)) + 1}": ("text", "text"),
    }
    assert found["dropped"]["minified"]["examples"] == ["p/app.min.js"]
    assert found["dropped"]["damaged row"]["n"] == 1
    assert list(found["inputs"]["unavailable"]) == ["far"]
    assert found["inputs"]["n_other_files"]["tree"] == 3  # two of JSON, a licence
    card = (folder / "README.md").read_text()
    assert f"| damaged row | 1 | `answers/rows.jsonl#{rows.read_text().index('{broken')} (" in card
    assert "| typescript | 1 |" in card


def test_secrets_are_replaced_and_counted(tmp_path: Path) -> None:
    text = program("x") + 'OWNER = "jane.roe@some-company.net"\n'
    tree = write_tree(tmp_path / "tree", {"a/x.py": text, "a/y.py": program("y")})
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree, filters={"redact": True}))
    texts = [*CorpusReader(folder, "train"), *CorpusReader(folder, "validation")]
    assert sorted(texts) == sorted([program("y"), program("x") + 'OWNER = "<EMAIL>"\n'])
    assert manifest(folder)["redacted"] == {"<EMAIL>": 1}


def test_rejects_can_be_read(tree: Path, tmp_path: Path) -> None:
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree, keep_rejects=True))
    rows = pq.read_table(folder / "rejects.parquet").to_pylist()
    assert {row["path"]: row["reason"] for row in rows} == {
        "binary.py": "binary",
        "latin.py": "not UTF-8",
        "small.py": "too small",
        "z_copy.py": "duplicate",
        "_vendor/copied.py": "vendored",
        "bad.py": "does not parse",
    }
    texts = {row["path"]: row["text"] for row in rows}
    assert texts["bad.py"] == JUNK["pkg2/bad.py"]
    assert texts["z_copy.py"] == JUNK["pkg1/z_copy.py"]


@pytest.mark.parametrize("action", ["drop", "cut"])
def test_benchmarks_are_kept_out(tmp_path: Path, action: str) -> None:
    solution = (
        "def has_close(numbers, threshold):\n"
        '    """Check whether in a given list of numbers any two are closer to each other than"""\n'
        "    for index, first in enumerate(numbers):\n"
        "        for other, second in enumerate(numbers):\n"
        "            if index != other and abs(first - second) < threshold:\n"
        "                return True\n    return False\n"
    )
    (tmp_path / "bench").mkdir()
    row = {"prompt": solution, "canonical_solution": "pass"}
    (tmp_path / "bench" / "b.jsonl").write_text(json.dumps(row) + "\n")
    files = {f"p/m{n}.py": program(f"m{n}") for n in range(3)}
    tree = write_tree(tmp_path / "tree", files | {"p/leak.py": program("a") + "\n\n" + solution})
    benchmarks = {"paths": [str(tmp_path / "bench")], "action": action}
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree, benchmarks=benchmarks))
    texts = "".join([*CorpusReader(folder, "train"), *CorpusReader(folder, "validation")])
    assert "closer" not in texts
    assert ("def a_0(" in texts) is (action == "cut")
    assert manifest(folder)["benchmarks"]["bench/b.jsonl"]["n_documents_hit"] == 1
    assert manifest(folder)["dropped"].get("benchmark", {}).get("n", 0) == (action == "drop")


def test_a_worker_that_dies_is_tried_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, n_calls = prepare._run, 0

    def fail(missing: Any, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:  # with a half of the rest done
            yield from whole(missing[: len(missing) // 2], *arguments)
        raise RuntimeError("the node is gone")

    def fail_twice(missing: Any, *arguments: Any) -> Any:
        return fail(missing, *arguments) if n_calls < 2 else whole(missing, *arguments)

    monkeypatch.setattr(listing, "UNIT_FILES", 2)
    monkeypatch.setattr(prepare, "_run", fail_twice)
    folder = prepare_corpus(make_recipe(tmp_path / "work", tree))
    assert content(folder) == content(prepare_corpus(make_recipe(tmp_path / "fresh", tree)))
    monkeypatch.setattr(prepare, "_run", fail)
    with pytest.raises(OSError, match="could not be staged: the node is gone"):
        prepare_corpus(make_recipe(tmp_path / "never", tree))
