"""Archives, git repositories and tables, whole, damaged and hostile."""

import gzip
import io
import json
import os
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trees import MIT_TEXT, program

from codellama.data import archives, listing
from codellama.data.archives import RawDocument
from codellama.data.listing import list_sources
from codellama.data.selection import count_in
from codellama.data.sources import read_unit
from codellama.data.staging import Settings, stage_unit
from codellama.recipe import Filters, Source

FILES = {"x-1.0/LICENSE": MIT_TEXT, "x-1.0/a.py": program("a"), "x-1.0/b/c.py": program("c")}


def tar_bytes(files: dict[str, str], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def write_archive(path: Path, files: dict[str, str]) -> Path:
    if path.suffix in (".zip", ".whl"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(tar_bytes(files))
    else:
        mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
        path.write_bytes(tar_bytes(files, mode))
    return path


def read(path: Path | str, kind: str = "archive", **fields: Any) -> list[RawDocument]:
    max_bytes = fields.pop("max_bytes", 1_000_000)
    source = Source.model_validate({"name": "s", "kind": kind, "path": str(path), **fields})
    units = list_sources((source,), Path("cache")).units
    found = [d for unit in units for d in read_unit(unit, source, max_bytes)]
    return [d for d in found if d.reason != archives.UNWANTED]


def reasons(found: list[RawDocument]) -> list[tuple[str, str | None]]:
    return [(document.path, document.reason) for document in found]


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.zst", "tar.xz", "zip", "whl"])
def test_every_kind_of_archive(tmp_path: Path, ending: str) -> None:
    if ending == "tgz":
        path = tmp_path / "x-1.0.tgz"
        path.write_bytes(tar_bytes(FILES, "w:gz"))
    else:
        path = write_archive(tmp_path / f"x-1.0.{ending}", FILES)
    found = read(path)
    assert [(d.path, d.content.decode()) for d in found] == [
        ("x-1.0/a.py", program("a")),
        ("x-1.0/b/c.py", program("c")),
    ]
    assert {(d.repository, d.licence) for d in found} == {("x-1.0", "MIT")}


@pytest.mark.parametrize("ending", ["tar.gz", "tar.zst", "tar", "zip", "tar.xz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.97])
def test_a_truncated_archive_is_reported_and_never_fatal(
    tmp_path: Path, ending: str, share: float
) -> None:
    files = {f"p/m{n}.py": os.urandom(2000).hex() for n in range(50)}
    path = write_archive(tmp_path / f"a.{ending}", files)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    found = read(path)
    assert found[-1].reason == "damaged archive"
    assert found[-1].path == path.name
    for document in found[:-1]:
        assert files[document.path].startswith(document.content.decode())


def test_a_damaged_member_costs_itself_alone(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.zip", {f"m{n}.py": program(f"m{n}") for n in range(3)})
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF  # inside the first member
    path.write_bytes(content)
    assert reasons(read(path)) == [("m0.py", "unreadable"), ("m1.py", None), ("m2.py", None)]


def test_paths_that_lead_out_are_refused(tmp_path: Path) -> None:
    bad = ["../up.py", "/etc/absolute.py", "a/../../up.py", "C\\\\..\\\\x.py", "a/..\\x.py"]
    for ending in ("zip", "tar.gz"):
        path = write_archive(tmp_path / f"a.{ending}", {n: program("x") for n in [*bad, "ok.py"]})
        found = {d.path: d for d in read(path)}
        assert found.pop("ok.py").reason is None
        assert len(found) == len(bad)
        assert {(d.reason, d.content) for d in found.values()} == {("unsafe path", b"")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "a.zip"]


def test_links_and_devices_in_archives_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (
            ("loop.py", tarfile.SYMTYPE),
            ("hard.py", tarfile.LNKTYPE),
            ("fifo.py", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "loop.py"
            archive.addfile(info)
    assert read(tmp_path / "a.tar") == []


@pytest.mark.parametrize("ending", ["tar.gz", "zip"])
def test_what_a_source_does_not_want_is_counted(tmp_path: Path, ending: str) -> None:
    others = {"notes.txt": "text", "node_modules/m.py": program("m"), "data.json": "{}"}
    path = write_archive(tmp_path / f"x-1.0.{ending}", FILES | others)
    if ending == "zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.mkdir("folder")
    source = Source(name="s", kind="archive", path=str(path))
    (unit,) = list_sources((source,), tmp_path).units
    found = list(read_unit(unit, source, 1_000_000))
    unwanted = {d.path for d in found if d.reason == archives.UNWANTED}
    assert unwanted == {*others, "x-1.0/LICENSE"}
    settings = Settings(filters=Filters(), near_duplicates=None)
    stage_unit(unit, source, settings, tmp_path, "staged")
    assert count_in(tmp_path / "staged.parquet", "n_other") == 4


def test_a_member_is_never_read_beyond_the_limit(tmp_path: Path) -> None:
    """A zip whose headers say 10 bytes and whose data are 50 MB."""
    path = write_archive(tmp_path / "bomb.zip", {"bomb.py": "#" * 50_000_000})
    assert path.stat().st_size < 100_000
    assert reasons(read(path, max_bytes=1000)) == [("bomb.py", "too large")]
    content = path.read_bytes().replace((50_000_000).to_bytes(4, "little"), b"\x0a\0\0\0")
    path.write_bytes(content)
    (document,) = read(path, max_bytes=1000)
    assert len(document.content) <= 1001


@pytest.mark.parametrize("ending", ["tar.gz", "tar.zst"])
def test_what_unpacks_to_far_more_than_its_size_is_left_off(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 1_000_000)
    files = {"ok.py": program("ok"), "zeros.py": "\0" * 30_000_000, "after.py": program("after")}
    path = write_archive(tmp_path / f"bomb.{ending}", files)
    found = reasons(read(path, max_bytes=10_000))
    assert found[0] == ("ok.py", None)
    assert found[-1] == (path.name, "archive bomb")
    assert ("after.py", None) not in found


def test_overlapping_members_of_a_zip_are_left_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand entries of the directory for one and the same data."""
    monkeypatch.setattr(archives, "FREE_BYTES", 1_000_000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.py", "#" * 500_000)
        (info,) = archive.infolist()
        archive.filelist.extend([info] * 1000)
    found = reasons(read(path))
    assert found[-1] == (path.name, "archive bomb")
    assert len(found) < 100


def test_row_groups_that_hold_far_more_than_their_size_are_left_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that its metadata give away, and one that repeats a value of its dictionary."""
    monkeypatch.setattr(archives, "FREE_BYTES", 1_000_000)
    path = tmp_path / "bomb.parquet"
    groups = [["first"], ["\0" * 3_000_000], [program("x", 200)] * 2000, ["last"]]
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        for texts in groups:
            writer.write_table(pa.table({"text": texts}))
    assert path.stat().st_size < 20_000
    found = read(path, "parquet", max_bytes=1_000_000)
    bombs = [(d.path, d.detail) for d in found if d.reason == "archive bomb"]
    assert bombs[0] == ("bomb.parquet#1", "row group 1")
    assert [detail for _, detail in bombs] == ["row group 1", "row group 2"]
    assert found[0].content == b"first"
    assert found[-1].content == b"last"
    assert len(found) < 1000


def test_git_repositories_bare_or_not(tmp_path: Path) -> None:
    work = tmp_path / "project"
    work.mkdir()
    (work / "LICENSE").write_text(MIT_TEXT)
    (work / "a.py").write_text(program("a"))
    (work / "large.py").write_text("#" * 5000)
    (work / "run").write_text("#!/usr/bin/env python3\n" + program("run"))
    (work / "link.py").symlink_to("a.py")
    canary = tmp_path / "canary"
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}

    def git(*arguments: str, folder: Path = work) -> None:
        command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x.y"]
        subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    git("config", "core.fsmonitor", f"touch {canary}")
    (work / "a.py").write_text("uncommitted")
    git("clone", "-q", "--bare", str(work), str(tmp_path / "bare.git"), folder=tmp_path)
    canary.unlink(missing_ok=True)
    for folder, name in ((work, "project"), (tmp_path / "bare.git", "bare")):
        source = Source(name="s", kind="git", path=str(folder))
        assert list_sources((source,), tmp_path).n_other["s"] == 2  # the licence and the link
        found = {d.path: d for d in read(folder, "git", max_bytes=1000)}
        assert sorted(found) == ["a.py", "large.py", "run"]
        assert found["a.py"].content.decode() == program("a")[:1001]
        assert len(found["large.py"].content) == 1001
        assert {(d.repository, d.licence) for d in found.values()} == {(name, "MIT")}
    assert not canary.exists()  # nothing of the repository ran


def test_what_is_no_git_repository_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    source = Source(name="s", kind="git", path=str(tmp_path / "repo"))
    listing = list_sources((source,), tmp_path)
    assert (listing.units, list(listing.unavailable)) == ([], ["s"])


ROWS = [
    {"body": "question", "answer": "reply", "file": "a.py", "repo": "r", "lic": "MIT"},
    {"body": "second", "answer": None, "file": None, "repo": None, "lic": None},
]
MAPPING: dict[str, Any] = {
    "text": ["body", "answer"],
    "path": "file",
    "repository": "repo",
    "licence": "lic",
}


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_tables_with_columns_of_any_name(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"t.{ending}", ROWS)
    kind = "parquet" if ending == "parquet" else "jsonl"
    first = len(json.dumps(ROWS[0])) + 1
    found = read(path, kind, columns=MAPPING, licence="CC0-1.0")
    assert [(d.content.decode(), d.path, d.repository, d.licence) for d in found] == [
        ("question\n\nreply", "a.py", "r", "MIT"),
        ("second", f"t.{ending}#{1 if kind == 'parquet' else first}", "s", "CC0-1.0"),
    ]


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 64, 150, 3000])
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "zip", "jsonl.gz"])
def test_each_document_of_a_large_container_is_in_one_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, unit_bytes: int
) -> None:
    """Also of lines that are longer than a part, empty, damaged, too large or without an end."""
    path, rng = tmp_path / f"t.{ending}", random.Random(unit_bytes)
    texts = [rng.randbytes(rng.randrange(1, 120)).hex() for _ in range(30)]
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=4)
    elif ending == "zip":
        write_archive(path, {f"m{n}.py": text for n, text in enumerate(texts)})
    else:
        lines = [json.dumps({"text": text}).encode() for text in texts]
        lines[3:3] = [b"", b'{"text": ', b"x" * 70_000]
        content = b"\r\n".join(lines)
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    kind = {"zip": "archive", "parquet": "parquet"}.get(ending, "jsonl")
    whole = read(path, kind, max_bytes=240)
    assert [d.content.decode() for d in whole if not d.reason] == texts or kind == "archive"
    assert {d.content.decode() for d in whole if not d.reason} == set(texts)
    monkeypatch.setattr(listing, "UNIT_BYTES", unit_bytes)
    parts = read(path, kind, max_bytes=240)
    assert sorted(map(str, parts)) == sorted(map(str, whole))
    source = Source.model_validate({"name": "s", "kind": kind, "path": str(path)})
    units = list_sources((source,), tmp_path).units
    size = path.stat().st_size
    assert len(units) == (1 if ending.endswith("gz") else -(-size // unit_bytes))
    assert sum(unit.n_bytes for unit in units) == size


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_missing_column_is_named(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"t.{ending}", ROWS)
    found = read(path, ending, columns={"text": "content"})
    assert {d.reason for d in found} == {"missing column"}
    assert "content" in found[0].detail


def test_broken_rows_cost_themselves_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = json.dumps({"text": "good"}).encode()
    huge = b'{"text": "' + b"x" * 200_000 + b'"}'
    nested = b"[" * 50_000
    lines = [good, b'{"text": ', b"\xff\xfe", b"[1]", b"", huge, nested, b'{"text": 5}', good]
    path.write_bytes(b"\n".join(lines))
    found = [document.reason for document in read(path, "jsonl", max_bytes=100)]
    damaged = "damaged row"
    expected = [None, damaged, damaged, damaged, "too large", damaged, "missing column", None]
    assert found == expected


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_truncated_table_is_reported(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"t.{ending}", [{"text": os.urandom(500).hex()}] * 300)
    path.write_bytes(path.read_bytes()[:-50])
    found = read(path, "parquet" if ending == "parquet" else "jsonl")
    assert (found[-1].path, found[-1].reason) == (path.name, "damaged archive")


def test_patterns_and_files_that_are_not_there(tmp_path: Path) -> None:
    for number in range(3):
        write_rows(tmp_path / f"t{number}.jsonl", [{"text": f"row {number}"}])
    found = read(tmp_path / "*.jsonl", "jsonl")
    assert [d.content.decode() for d in found] == ["row 0", "row 1", "row 2"]
    assert read(tmp_path / "*.absent", "jsonl") == []
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        read(tmp_path / "nowhere.jsonl", "jsonl")


def test_no_network_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = Source(name="far", kind="parquet", path="s3://no-such-bucket-here/x/*.parquet")
    listing = list_sources((source,), tmp_path)
    assert listing.units == []
    assert "cannot be listed" in listing.unavailable["far"]
    assert "source far: left out: s3://" in capfd.readouterr().err
