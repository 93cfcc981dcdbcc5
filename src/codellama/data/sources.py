"""Sources: which files a corpus is made of, and the bytes of each.

Lists and reads Python files of four kinds: the interpreter's own library, its installed packages,
packages fetched by name, and folders. It judges nothing (that is `filters`), installs nothing and
runs nothing: a fetched package is a wheel, read as the zip file that it is.

In: a recipe's sources. Out: `SourceFile` records in a fixed order, and bytes from `read_file`.
"""

from __future__ import annotations

import email
import errno
import os
import re
import stat
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from codellama.data.licences import LICENCE_FILE, UNKNOWN, licence_of_metadata
from codellama.recipe import Source

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", ".git", ".hg", ".tox", ".nox", ".venv", "venv", "node_modules"}
    | {"site-packages", "dist-packages", "lib-dynload"}
)
OWN_PACKAGE = "codellama"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file that may become a document."""

    source: str
    repository: str
    """Package or top-level folder: the unit that is held out whole."""
    path: str
    """Inside the repository's tree, with forward slashes; never a path of this machine."""
    licence: str
    location: bytes
    """The file, or the wheel that holds it, as the file system names it."""
    member: str
    """Name inside the wheel; empty for a plain file."""
    size: int
    crc: int
    """Of the content, -1 if it cannot be read: with the size, what a re-run compares."""


@dataclass
class Listing:
    """What the sources of a corpus hold."""

    files: list[SourceFile] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    """File names of the wheels that were read."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """`source/package` -> why nothing could be taken from it."""


def list_sources(sources: tuple[Source, ...], cache: Path) -> Listing:
    """List the files of all sources, in the order of the sources and then by path.

    cache: folder for fetched wheels; one that is there is not fetched again.

    Raises:
        ValueError: a source's folder is missing, or a package name is not one.
    """
    listing = Listing()
    for source in sources:
        if source.kind == "stdlib":
            found = _list_stdlib(source)
        elif source.kind == "installed":
            found = _list_installed(source)
        elif source.kind == "pypi":
            found = _list_wheels(source, cache, listing)
        else:
            found = _list_tree(source)
        files = sorted(found, key=lambda file: (file.repository, file.path))
        if source.packages and source.kind != "pypi":
            wanted = {normalised_name(name): name for name in source.packages}
            files = [file for file in files if normalised_name(file.repository) in wanted]
            for name in wanted.keys() - {normalised_name(file.repository) for file in files}:
                listing.unavailable[f"{source.name}/{wanted[name]}"] = "holds no Python files here"
        listing.files += files
    return listing


def read_file(location: bytes, member: str, max_bytes: int) -> bytes:
    """Read one listed file, at most `max_bytes + 1` bytes of it.

    The limit holds for what is really read, so a wheel whose headers lie cannot fill the memory.

    Raises:
        OSError: the file cannot be read, is not a regular file, or the wheel is damaged.
    """
    if not member:
        with open(_open_regular(location), "rb") as file:
            return file.read(max_bytes + 1)
    try:
        with _wheel(location).open(member) as file:
            return file.read(max_bytes + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        # RuntimeError: an encrypted member; NotImplementedError is one: unknown compression.
        raise OSError(errno.EIO, f"{os.fsdecode(location)}: {member}: {error}") from None


def normalised_name(name: str) -> str:
    """A package name as the index compares it: `Zope.Interface` -> `zope-interface`."""
    return re.sub(r"[-_.]+", "-", name).lower()


@lru_cache(maxsize=4)
def _wheel(location: bytes) -> zipfile.ZipFile:
    """Keep the last wheels open: reading the directory of one for each member costs 10 ms."""
    return zipfile.ZipFile(os.fsdecode(location))


def _open_regular(location: bytes) -> int:
    """Open without blocking on a FIFO, and refuse what is not a regular file."""
    descriptor = os.open(location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(location))
    return descriptor


def _plain_file(source: str, repository: str, path: str, licence: str, file: Path) -> SourceFile:
    """Describe one file of a folder."""
    size, crc = 0, 0
    try:
        with open(_open_regular(os.fsencode(file)), "rb") as handle:
            while chunk := handle.read(1 << 20):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    except OSError:
        size, crc = 0, -1  # stays listed, so that it is counted as unreadable
    return SourceFile(source, repository, _text(path), licence, os.fsencode(file), "", size, crc)


def _text(path: str) -> str:
    """A path that can be stored as UTF-8, whatever bytes the file system holds."""
    return path.replace(os.sep, "/").encode("utf-8", "backslashreplace").decode("utf-8")


def _python_files(root: Path) -> Iterator[Path]:
    """Files named *.py below a folder, without caches and other people's environments.

    A folder that cannot be read is yielded itself, so that it is counted as unreadable.
    """
    blocked: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=lambda e: blocked.append(Path(e.filename))):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
    yield from blocked


def _list_stdlib(source: Source) -> Iterator[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in _python_files(root):
        path = file.relative_to(root).as_posix()
        yield _plain_file(source.name, "cpython", path, "PSF-2.0", file)


def _list_installed(source: Source) -> Iterator[SourceFile]:
    """Installed packages, each file assigned to the distribution whose RECORD names it."""
    for root in sorted({Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}):
        owners: dict[str, tuple[str, str]] = {}
        for distribution in metadata.distributions(path=[str(root)]):
            name = normalised_name(distribution.metadata["Name"] or "")
            files = distribution.files or []
            texts = [
                _read_text(Path(str(file.locate())))
                for file in files
                if ".dist-info/" in file.as_posix() and LICENCE_FILE.fullmatch(file.name)
            ]
            owner = name, licence_of_metadata(distribution.metadata, texts)  # type: ignore[arg-type]
            for file in files:
                owners[file.as_posix()] = owner
        for file in _python_files(root):
            path = file.relative_to(root).as_posix()
            top_level = path.split("/")[0].removesuffix(".py")
            name, licence = owners.get(path, (normalised_name(top_level), UNKNOWN))
            if name != OWN_PACKAGE:
                yield _plain_file(source.name, name, path, licence, file)


def _list_tree(source: Source) -> Iterator[SourceFile]:
    """A folder: one repository if it carries a licence or project file, else one per sub-folder."""
    root = source.path
    assert root is not None  # the recipe checks it
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder (source {source.name!r} of the recipe)")
    whole = _folder_licence(root) != UNKNOWN or any(
        (root / name).exists() for name in (".git", "pyproject.toml", "setup.py", "setup.cfg")
    )
    licences: dict[Path, str] = {}
    for file in _python_files(root):
        path = file.relative_to(root).as_posix()
        folder = root if whole or "/" not in path else root / path.split("/")[0]
        if folder not in licences:
            licences[folder] = _folder_licence(folder)
        repository, inner = _text(folder.resolve().name), file.relative_to(folder).as_posix()
        yield _plain_file(source.name, repository, inner, licences[folder], file)


def _folder_licence(folder: Path) -> str:
    """Licence of a source tree: its PKG-INFO if it has one, else its licence files."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    texts = [_read_text(file) for file in files if LICENCE_FILE.fullmatch(file.name)]
    return licence_of_metadata(email.message_from_string(_read_text(folder / "PKG-INFO")), texts)


def _read_text(file: Path) -> str:
    """A text that says something about a licence; a missing or unreadable one says nothing."""
    try:
        with open(_open_regular(os.fsencode(file)), "rb") as handle:
            return handle.read(1_000_000).decode("utf-8", "replace")
    except OSError:
        return ""


def _list_wheels(source: Source, cache: Path, listing: Listing) -> Iterator[SourceFile]:
    for package in source.packages:
        key = f"{source.name}/{package}"
        try:
            wheel = fetch_wheel(package, cache)
            found = list(_list_wheel(source.name, normalised_name(_split_pin(package)[0]), wheel))
        except (OSError, zipfile.BadZipFile) as error:
            # One package that cannot be had must not cost the others; the manifest names it.
            listing.unavailable[key] = "could not be fetched or read"
            print(f"source {key}: left out: {error}", file=sys.stderr)
            continue
        listing.archives.append(wheel.name)
        yield from found


def _list_wheel(source: str, repository: str, wheel: Path) -> Iterator[SourceFile]:
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
        headers, texts = email.message_from_string(""), []
        for info in members:
            folder, _, name = info.filename.partition(".dist-info/")
            if not name or "/" in folder or info.file_size > 1_000_000:
                continue
            if name == "METADATA":
                headers = email.message_from_bytes(archive.read(info))
            elif LICENCE_FILE.fullmatch(name.rsplit("/", 1)[-1]):
                texts.append(archive.read(info).decode("utf-8", "replace"))
        licence = licence_of_metadata(headers, texts)
        location = os.fsencode(wheel)
        for info in members:
            name = info.filename
            if name.endswith(".py") and not SKIPPED_FOLDERS.intersection(name.split("/")):
                path = _text(name)
                size, crc = info.file_size, info.CRC
                yield SourceFile(source, repository, path, licence, location, name, size, crc)


_PACKAGE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+]+))?")


def _split_pin(package: str) -> tuple[str, str | None]:
    """`name` or `name==version`; anything else could be read as an option by pip."""
    found = _PACKAGE.fullmatch(package)
    if not found:
        raise ValueError(f"packages: {package!r} is not a package: expected name or name==version")
    return found[1], found[2]


def cached_wheel(package: str, cache: Path) -> Path | None:
    """The wheel of `name` or `name==version` in the cache, if it is there."""
    name, version = _split_pin(package)
    for wheel in sorted(cache.glob("*.whl"), reverse=True):
        parts = wheel.name.split("-")
        if normalised_name(parts[0]) == normalised_name(name) and version in (None, parts[1]):
            return wheel
    return None


def fetch_wheel(package: str, cache: Path, timeout_s: float = 600) -> Path:
    """Return the wheel of a package, fetching it with pip if the cache has none.

    Only built wheels are taken: a source distribution would run its own set-up code.

    Raises:
        OSError: pip could not fetch it; the message is pip's own.
        ValueError: the name is not a package name.
    """
    if wheel := cached_wheel(package, cache):
        return wheel
    # Fetched beside and then renamed: a wheel in the cache is whole.
    incoming = cache / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
        "-d",
        str(incoming),
        package,
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"pip download {package}: no answer within {timeout_s:.0f} s") from None
    wheel = cached_wheel(package, incoming)
    if done.returncode or not wheel:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise OSError(f"pip download {package}: {errors[-1] if errors else 'no wheel'}")
    return wheel.replace(cache / wheel.name)
