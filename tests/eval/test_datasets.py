"""Benchmark files: found, checked, downloaded, refused."""

import gzip
import hashlib
import shutil
import tomllib
import urllib.error
from pathlib import Path

import pytest

from codellama.eval import datasets

NAME = "humaneval/HumanEval.jsonl.gz"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data folder but those that a test makes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CODELLAMA_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Answer:
    def __init__(self, content):
        self.read = lambda n: content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_found_by_folder_and_recompressed(shared_data, tmp_path, monkeypatch):
    content = gzip.decompress((shared_data / NAME).read_bytes())
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(content, 1))
    assert len(datasets.data_file(NAME, tmp_path).rows()) == 164
    (tmp_path / "shared" / "data" / "humaneval").mkdir(parents=True)
    shutil.copy(shared_data / NAME, tmp_path / "shared" / "data" / NAME)
    assert datasets.data_file(NAME).sha256 == datasets.KNOWN[NAME]
    monkeypatch.setenv("CODELLAMA_DATA", str(shared_data))
    assert datasets.data_file(NAME).path == str(shared_data / NAME)


def test_other_content_is_refused_unless_named(tmp_path):
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"task_id": "x"}\n'))
    with pytest.raises(ValueError, match=r"content has SHA-256 .*, expected 1d49078b"):
        datasets.data_file(NAME, tmp_path)
    assert datasets.data_file(NAME, file).rows() == [{"task_id": "x"}]


@pytest.mark.parametrize("content", [b"\x1f\x8bbroken", gzip.compress(b"x" * 999, mtime=0)[:-9]])
def test_damaged(tmp_path, content):
    (file := tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be read"):
        datasets.data_file(NAME, file)


def test_rows_name_the_line(tmp_path):
    (file := tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON"):
        datasets.data_file(NAME, file).rows()
    (file := tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a list of objects"):
        datasets.data_file(NAME, file).rows()


def test_offline_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"cannot be reached .*; give it with --data FILE"):
        datasets.data_file(NAME)
    with pytest.raises(ValueError, match="there is no source to download it from"):
        datasets.data_file("ds1000/ds1000.jsonl.gz")


def test_downloaded_once_and_checked(shared_data, monkeypatch):
    raw = (shared_data / NAME).read_bytes()
    asked = []

    def serve(url, timeout):
        asked.append(url)
        return Answer(raw)

    monkeypatch.setattr(datasets.urllib.request, "urlopen", serve)
    for _ in range(2):
        assert len(datasets.data_file(NAME).rows()) == 164
    assert len(asked) == 1
    assert asked[0].startswith("https://raw.githubusercontent.com/openai/human-eval/")
    other = "humanevalplus/HumanEvalPlus.jsonl.gz"
    with pytest.raises(ValueError, match="content has SHA-256"):
        datasets.data_file(other)
    with pytest.raises(ValueError, match="content has SHA-256"):  # nothing wrong was kept
        datasets.data_file(other)


def test_known_checksums_are_those_of_the_files(shared_data):
    for name, expected in datasets.KNOWN.items():
        path = shared_data / name
        if path.exists():
            content = path.read_bytes()
            content = gzip.decompress(content) if name.endswith(".gz") else content
            assert hashlib.sha256(content).hexdigest() == expected, name


def test_every_table_is_packaged():
    """A built package holds whatever stands beside the code of this folder."""
    folder = Path(datasets.__file__).parent
    project = tomllib.loads((folder.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["codellama"]
    packaged = {path for pattern in patterns for path in folder.parent.glob(pattern)}
    beside = {path for path in folder.glob("*.*") if path.suffix != ".py"}
    assert {path.name for path in beside} >= {"datasets.txt", "paper.txt", "report.html"}
    assert beside <= packaged
