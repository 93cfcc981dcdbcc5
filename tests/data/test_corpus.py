import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from trees import program

from codellama.artifact import write_manifest
from codellama.cli import run_command
from codellama.data import corpus
from codellama.data.corpus import SCHEMA, CorpusReader, ShardWriter, corpus_documents

TEXTS = [program(f"module_{n}", 5 + n % 7) + "# ünïcode 日本\r\n" for n in range(60)]


def row(number: int, split: str) -> dict[str, Any]:
    text = TEXTS[number]
    digest = hashlib.sha256(text.encode()).hexdigest()
    fixed = {"source": "s", "repository": "r", "language": "python", "licence": "MIT"}
    fixed["kind"] = "code"
    size = len(text.encode())
    path = f"{number}.py"
    return fixed | {"text": text, "path": path, "n_bytes": size, "sha256": digest, "split": split}


def table(numbers: Iterable[int], split: str) -> pa.Table:
    return pa.Table.from_pylist([row(number, split) for number in numbers], schema=SCHEMA)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fifty training documents in several shards of several row groups, ten for validation."""
    monkeypatch.setattr(corpus, "ROW_GROUP_BYTES", 1500)
    shards = []
    for split, numbers in (("train", range(50)), ("validation", range(50, 60))):
        writer = ShardWriter(tmp_path, split, shard_bytes=8000)
        writer.add(table(numbers, split))
        writer.close()
        shards += writer.shards
    write_manifest(tmp_path, "corpus", shards=shards, fingerprint="f")
    return tmp_path


def test_reads_what_was_written_in_any_order(folder: Path) -> None:
    reader = corpus_documents(folder, "train")
    assert len(list(folder.glob("train-*.parquet"))) > 2
    assert len(reader) == 50
    assert list(reader) == TEXTS[:50]
    for index in random.Random(0).sample(range(50), 50):
        assert reader.text(index) == TEXTS[index]
        assert reader.sha256(index) == hashlib.sha256(TEXTS[index].encode()).hexdigest()
    assert reader.row(17) == row(17, "train")
    assert list(CorpusReader(folder, "validation")) == TEXTS[50:]
    assert reader.fingerprint == "f"


def test_shards_do_not_depend_on_how_many_documents_come_at_a_time(
    folder: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    writer = ShardWriter(again, "train", shard_bytes=8000)
    numbers = list(range(50))
    for begin, end in ((0, 1), (1, 8), (8, 8), (8, 40), (40, 50)):
        writer.add(table(numbers[begin:end], "train"))
    writer.close()
    for shard in writer.shards:
        assert (again / shard["file"]).read_bytes() == (folder / shard["file"]).read_bytes()
    assert len(writer.shards) == len(list(folder.glob("train-*")))


def test_random_documents_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beginnings = {f"r/{n}.py": TEXTS[n][:600] for n in range(50)}
    shown: set[str] = set()
    for _ in range(5):
        assert run_command(["inspect", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["random_documents"]
        assert len(found) == 3
        assert found.items() <= beginnings.items()
        shown |= found.keys()
    assert len(shown) > 3  # the same three each time: p = 10^-17
    assert run_command(["inspect", str(folder)]) == 0
    assert any(f"\n      {text.split()[0]}" in capsys.readouterr().out for text in TEXTS)


def test_a_small_cache_gives_the_same_texts_and_stays_small(folder: Path) -> None:
    reader = CorpusReader(folder, "train", cache_bytes=4000)
    for index in random.Random(1).choices(range(50), k=200):
        assert reader.text(index) == TEXTS[index]
        assert reader._cached_bytes <= 4000
        assert reader._cached_bytes == sum(table.nbytes for table in reader._cache.values())


@pytest.mark.parametrize("index", [-1, 50, 10**9])
def test_index_outside_the_split(folder: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"document {index} of 50"):
        CorpusReader(folder, "train").text(index)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        del content[-100:]
    elif how == "empty":
        content.clear()
    else:
        content += b"more"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "flipped", "truncated", "empty", "longer"])
@pytest.mark.parametrize("shard", ["train-00000.parquet", "train-00001.parquet"])
def test_a_damaged_shard_is_named(folder: Path, shard: str, how: str) -> None:
    damage(folder / shard, how)
    with pytest.raises(ValueError, match=shard):
        CorpusReader(folder, "train")
    assert len(CorpusReader(folder, "validation")) == 10  # of which nothing is wrong


def test_a_shard_that_is_no_parquet_file_is_named_even_unverified(folder: Path) -> None:
    damage(folder / "train-00001.parquet", "truncated")
    with pytest.raises(ValueError, match=r"train-00001\.parquet: not a readable shard"):
        CorpusReader(folder, "train", verify=False)


def test_shards_outside_the_folder_are_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../train-00000.parquet"
    (folder.parent / "train-00000.parquet").write_bytes(
        (folder / "train-00000.parquet").read_bytes()
    )
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="train-00000"):
        CorpusReader(folder, "train")


def test_what_is_no_corpus(tmp_path: Path, folder: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a corpus folder"):
        CorpusReader(empty, "train")
    with pytest.raises(ValueError, match="nowhere"):
        CorpusReader(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="no split 'test'"):
        CorpusReader(folder, "test")  # type: ignore[arg-type]
    write_manifest(empty, "run")
    with pytest.raises(ValueError, match="run"):
        CorpusReader(empty, "train")
