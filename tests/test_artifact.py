import errno
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest

from codellama import artifact
from codellama.artifact import (
    new_folder,
    read_manifest,
    sha256_file,
    write_file,
    write_manifest,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(path, content):
    with new_folder(path) as temporary:
        (temporary / "file").write_text(content)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(content)


def test_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folder_is_replaced(tmp_path, can_exchange, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(artifact, "_exchange", lambda a, b: False)
    fill(tmp_path / "a", "old")
    (tmp_path / "a" / "only old").touch()
    fill(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file", "inner"]
    assert (tmp_path / "a" / "file").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="two renames elsewhere")
def test_there_is_always_a_folder_while_one_is_replaced(tmp_path):
    fill(tmp_path / "a", "0")
    seen: list[bool] = []
    is_done = threading.Event()

    def watch():
        while not is_done.is_set():
            seen.append(os.path.exists(tmp_path / "a"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for i in range(50):
            fill(tmp_path / "a", str(i))
    finally:
        is_done.set()
        watcher.join()
    assert len(seen) > 50
    assert all(seen)


def test_error_leaves_what_was_there(tmp_path):
    fill(tmp_path / "a", "old")

    def interrupted():
        with new_folder(tmp_path / "a") as temporary:
            (temporary / "file").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_rename_that_fails_leaves_what_was_there(tmp_path, can_exchange, monkeypatch):
    fill(tmp_path / "a", "old")
    rename = type(tmp_path).rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(artifact, "_exchange", lambda a, b: can_exchange and fail(a, b))
    monkeypatch.setattr(type(tmp_path), "rename", fail)
    with pytest.raises(OSError, match="broken"):
        fill(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "old"


def test_everything_is_flushed_before_it_counts(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def note(descriptor):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        assert (tmp_path / "a").exists() == (flushed[-1] == tmp_path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    fill(tmp_path / "a", "x")
    temporary = f".a.{os.getpid()}.tmp"
    assert sorted(flushed[:-2]) == ["file", "file", "inner"]
    assert flushed[-2:] == [temporary, tmp_path.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from codellama.artifact import new_folder
with new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "file").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_leaves_what_was_there_and_the_next_write_cleans_up(tmp_path):
    fill(tmp_path / "a[1]", "old")
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a[1]")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    assert (tmp_path / "a[1]" / "file").read_text() == "old"
    fill(tmp_path / "a[1]", "new")
    assert names(tmp_path) == ["a[1]"]


def test_left_over_of_a_process_with_our_own_id(tmp_path):
    """In a container every start has the same process id."""
    (tmp_path / f".a.{os.getpid()}.tmp").mkdir()
    (tmp_path / f".f.{os.getpid()}.tmp").write_text("part")
    fill(tmp_path / "a", "new")
    write_file(tmp_path / "f", "new")
    assert names(tmp_path) == ["a", "f"]


def test_folder_of_a_living_process_is_left_alone(tmp_path):
    other = tmp_path / f".a.{os.getppid()}.tmp"
    other.mkdir()
    fill(tmp_path / "a", "new")
    assert other.is_dir()


def test_file_is_replaced_or_left(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, "old")
    write_file(path, b"bytes")
    assert path.read_bytes() == b"bytes"

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert path.read_bytes() == b"bytes"
    assert names(tmp_path) == ["file"]


def test_manifest_round_trip(tmp_path):
    write_manifest(tmp_path, "corpus", counts={"train": 3})
    manifest = read_manifest(tmp_path, "corpus")
    assert manifest["counts"] == {"train": 3}
    assert manifest["kind"] == "corpus"
    assert manifest["format_version"] == 1
    assert manifest["code_version"]


def test_manifest_problems_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_manifest(tmp_path / "nothing", "corpus")
    with pytest.raises(ValueError, match=r"not a corpus folder.*manifest\.json"):
        read_manifest(tmp_path, "corpus")
    write_manifest(tmp_path, "checkpoint")
    with pytest.raises(ValueError, match="expected a corpus folder, found kind 'checkpoint'"):
        read_manifest(tmp_path, "corpus")
    for content in (b'{"kind": "corp', b"\xff\xfe", b""):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match="not readable as JSON"):
            read_manifest(tmp_path, "corpus")
    (tmp_path / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="found kind None"):
        read_manifest(tmp_path, "corpus")


def test_checksum(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_file(tmp_path / "file").startswith("ba7816bf8f01cfea")


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    hold = partial(artifact.only_process, tmp_path / "new", "counts stars")
    with hold(), pytest.raises(ValueError, match="new: another process counts stars"), hold():
        pass
    with hold():
        pass
