"""Artifacts: the folders that stages leave behind, written whole or not at all.

A folder is filled under a temporary name beside its destination, flushed to disk, and renamed, so
that a folder which exists is complete and a crash, a full disk or a kill leaves what was there
before. Every artifact carries a manifest.json that says what it is and what it was made from.

It deliberately knows nothing of what the folders hold.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def code_version() -> str:
    """The installed version of this package."""
    try:
        return version("codellama")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    _remove_left_overs(path)
    temporary = _temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it becomes `path`.

    A folder that already stands at `path` is replaced only then. When the block raises, the
    temporary folder is removed and `path` is as it was.

    Raises:
        OSError: the folder cannot be made or flushed.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(path)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        _flush(temporary)
        _put_in_place(temporary, path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)  # where folders were exchanged: the old one


def write_manifest(folder: Path, kind: str, **content: Any) -> None:
    """Write the manifest of an artifact into its (not yet renamed) folder."""
    manifest = {"kind": kind, "format_version": 1, "code_version": code_version(), **content}
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read an artifact's manifest.

    Raises:
        ValueError: the folder is missing, is not an artifact, or is one of another kind.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected a {kind})")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a {kind} folder: it has no {MANIFEST}") from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST}: not readable as JSON: {error}") from None
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found != kind:
        raise ValueError(f"{folder}: expected a {kind} folder, found kind {found!r}")
    return manifest


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_left_overs(path: Path) -> None:
    """Delete what killed processes left beside `path`; they would fill the disk."""
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = left_over.name.removesuffix(".tmp").rpartition(".")[2]
        # In a container the same id comes again at every start: our own is no other process.
        if process != str(os.getpid()) and Path(f"/proc/{process}").exists():
            continue
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder; one that stands in its place is exchanged for it.

    Renaming the old folder away first would leave a moment without either, and a kill in it would
    lose the old one.
    """
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        old = temporary.with_name(temporary.name.removesuffix(".tmp") + ".old")
        path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


@contextmanager
def only_process(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder locked, made if it is not there; the lock ends with the process.

    Args:
        doing: what another process that holds it does, for the error.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process {doing}") from None
        yield
    finally:
        os.close(descriptor)
