"""Listing: the units of work of all sources, without reading a document.

A new source or file leaves the units of all others as they are. Only `pip download` and `git` run.

In: a recipe's sources. Out: `Listing`, in the order of the sources.
"""

from __future__ import annotations

import email
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from codellama.data.archives import END, GIT_ENVIRONMENT, IN_PARTS, read_git
from codellama.data.licences import LICENCE_FILE, UNKNOWN, licence_of_metadata
from codellama.data.sources import (
    REMOTE,
    SKIPPED_FOLDERS,
    Entry,
    Unit,
    as_text,
    open_regular,
    takes,
)
from codellama.data.wheels import cached_wheel, fetch_wheel, normalised_name, split_pin
from codellama.recipe import Source

OWN_PACKAGE = "codellama"
UNIT_FILES, UNIT_BYTES = 512, 32_000_000  # on average, and at most: seconds of work


@dataclass
class Listing:
    """What the sources of a corpus hold."""

    units: list[Unit] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    """File names of the archives and tables that were found."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """`source/package` -> why nothing could be taken from it."""
    n_other: Counter[str] = field(default_factory=Counter)
    """Of a source files in no language that it takes, links, and folders passed over."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A file of a tree before it is put into a unit."""

    entry: Entry
    n_bytes: int
    state: str


def list_sources(sources: tuple[Source, ...], cache: Path, fetch: bool = True) -> Listing:
    """List the units of all sources, in the order of the sources.

    cache: folder for fetched wheels; one that is there is not fetched again, and none is without
    `fetch`.

    Raises:
        ValueError: a source's folder is missing, or a package name is not one.
    """
    listing = Listing()
    for source in sources:
        if source.kind == "pypi":
            listing.units += _list_wheels(source, cache, listing, fetch)
        elif source.kind == "git":
            listing.units += _list_git(source, listing)
        elif source.kind in ("archive", "parquet", "jsonl"):
            listing.units += _list_containers(source, listing)
        else:
            listing.units += _list_files(source, listing)
    return listing


def _file(repository: str, path: str, licence: str, file: Path, root: Path | None = None) -> _Found:
    """Describe one file of a folder; what cannot be read stays listed, to be counted.

    root: a symbolic link that leads out of it is not followed.
    """
    location, state, n_bytes = os.fsdecode(file), "unreadable", 0
    try:
        if root and file.is_symlink() and not file.resolve(strict=True).is_relative_to(root):
            location = ""
        status = file.stat()
        # A change of the content always changes the last of these; only the system sets it.
        state = f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {status.st_ctime_ns}"
        n_bytes = status.st_size
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        pass
    return _Found(Entry(repository, as_text(path), licence, location), n_bytes, state)


def _in_units(source: Source, found: Iterable[_Found], **fields: str) -> Iterator[Unit]:
    """Cut a list of files into units, where their names say: a new file changes one unit alone."""
    part: list[_Found] = []
    for file in found:
        part.append(file)
        n_bytes = sum(f.n_bytes for f in part) if len(part) % 64 == 0 else 0
        ends = zlib.crc32(file.entry.path.encode()) % UNIT_FILES == 0
        if ends or len(part) >= 8 * UNIT_FILES or n_bytes >= UNIT_BYTES:
            yield _unit(source, part, **fields)
            part = []
    if part:
        yield _unit(source, part, **fields)


def _unit(source: Source, part: list[_Found], location: str = "", repository: str = "") -> Unit:
    state = hashlib.sha256("\n".join(file.state for file in part).encode()).hexdigest()
    return Unit(
        source.name,
        "git" if source.kind == "git" else "files",
        location,
        f"{part[0].entry.repository}/{part[0].entry.path}",
        state,
        sum(file.n_bytes for file in part),
        repository,
        part[0].entry.licence if source.kind == "git" else source.licence,
        tuple(file.entry for file in part),
    )


def _list_files(source: Source, listing: Listing) -> Iterator[Unit]:
    """Units of the kinds that are folders."""
    listers = {"stdlib": _list_stdlib, "installed": _list_installed, "tree": _list_tree}
    found = sorted(listers[source.kind](source, listing), key=lambda file: file.entry[:2])
    if source.packages:
        wanted = {normalised_name(name): name for name in source.packages}
        found = [file for file in found if normalised_name(file.entry.repository) in wanted]
        for name in wanted.keys() - {normalised_name(file.entry.repository) for file in found}:
            listing.unavailable[f"{source.name}/{wanted[name]}"] = "holds no wanted files here"
    return _in_units(source, found)


def _wanted_files(root: Path, source: Source, listing: Listing) -> Iterator[Path]:
    """Wanted files below a folder, without caches and other people's environments.

    A folder that cannot be read is yielded itself, so that it is counted as unreadable.
    """
    blocked: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=lambda e: blocked.append(Path(e.filename))):
        kept = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        wanted = sorted(name for name in names if takes(source, name))
        listing.n_other[source.name] += len(folders) - len(kept) + len(names) - len(wanted)
        folders[:] = kept
        yield from (Path(folder, name) for name in wanted)
    yield from blocked


def _list_stdlib(source: Source, listing: Listing) -> Iterator[_Found]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in _wanted_files(root, source, listing):
        yield _file("cpython", file.relative_to(root).as_posix(), "PSF-2.0", file)


def _list_installed(source: Source, listing: Listing) -> Iterator[_Found]:
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
        for file in _wanted_files(root, source, listing):
            path = file.relative_to(root).as_posix()
            top_level = path.split("/")[0].removesuffix(".py")
            name, licence = owners.get(path, (normalised_name(top_level), UNKNOWN))
            if name != OWN_PACKAGE:
                yield _file(name, path, licence, file)


def _list_tree(source: Source, listing: Listing) -> Iterator[_Found]:
    """A folder: one repository if it carries a licence or project file, else one per sub-folder."""
    root = _folder(source)
    names = (".git", "pyproject.toml", "setup.py", "setup.cfg", "package.json", "Cargo.toml")
    whole = _folder_licence(root) != UNKNOWN or any((root / name).exists() for name in names)
    about: dict[str, tuple[str, str]] = {}  # of each repository's folder its name and licence
    resolved = root.resolve()
    for file in _wanted_files(root, source, listing):
        path = file.relative_to(root).as_posix()
        inside = "" if whole or "/" not in path else path.split("/")[0]
        if inside not in about:
            name = as_text((root / inside).resolve().name)
            about[inside] = name, _folder_licence(root / inside)
        repository, licence = about[inside]
        yield _file(repository, path.removeprefix(f"{inside}/"), licence, file, resolved)


def _folder(source: Source) -> Path:
    root = Path(source.path or "")  # the recipe checks it
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder (source {source.name!r} of the recipe)")
    return root


def _folder_licence(folder: Path) -> str:
    """Licence of a source tree: its PKG-INFO if it has one, else its licence files."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    texts = [_read_text(file) for file in files if LICENCE_FILE.fullmatch(file.name)]
    return licence_of_metadata(email.message_from_string(_read_text(folder / "PKG-INFO")), texts)


def _read_text(file: Path) -> str:
    """A text that says something about a licence; a missing or unreadable one says nothing."""
    try:
        with open(open_regular(os.fsencode(file)), "rb") as handle:
            return handle.read(1_000_000).decode("utf-8", "replace")
    except OSError:
        return ""


def _list_wheels(source: Source, cache: Path, listing: Listing, fetch: bool) -> Iterator[Unit]:
    for package in source.packages:
        key = f"{source.name}/{package}"
        try:
            wheel = fetch_wheel(package, cache) if fetch else cached_wheel(package, cache)
            if not wheel:
                raise OSError("not fetched yet")
        except OSError as error:
            # One package that cannot be had must not cost the others; the manifest names it.
            listing.unavailable[key] = "could not be fetched"
            print(f"source {key}: left out: {error}", file=sys.stderr)
            continue
        file = _file("", wheel.name, "", wheel)
        yield from _container_units(source, file, listing, normalised_name(split_pin(package)[0]))


_ARCHIVE_ENDING = re.compile(r"(?i)\.(?:tar(?:\.\w+)?|t[gbx]z2?|tzst|zip|whl|egg|jar)$")


def _container_units(
    source: Source, file: _Found, listing: Listing, repository: str = ""
) -> Iterator[Unit]:
    """An archive or a table: one unit, of a large one several where the format allows it."""
    name, location = file.entry.path, file.entry.location
    listing.archives.append(name)
    reader = "table" if source.kind in ("parquet", "jsonl") else "archive"
    if not repository:
        repository = source.name if reader == "table" else _ARCHIVE_ENDING.sub("", name)
    step = UNIT_BYTES if name.lower().endswith(IN_PARTS) else END
    for begin in range(0, file.n_bytes or 1, step):
        end = begin + step if begin + step < file.n_bytes else END
        size = min(end, file.n_bytes) - begin
        fields = (source.name, reader, location, name, file.state, size, repository, source.licence)
        yield Unit(*fields, begin=begin, end=end)


def _list_containers(source: Source, listing: Listing) -> Iterator[Unit]:
    """Archives and tables: one unit for each file that the path or pattern names."""
    path = source.path or ""
    if REMOTE.match(path):
        found = _list_remote(source, path, listing)
    else:
        files = [Path(path)]
        if Path(path).is_dir():
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        elif re.search(r"[*?\[]", path) and not os.path.lexists(path):
            anchor = Path(path).anchor
            files = sorted(Path(anchor).glob(path.removeprefix(anchor)))
        elif not os.path.lexists(path):
            raise ValueError(f"{path}: no such file (source {source.name!r} of the recipe)")
        if not files:
            listing.unavailable[source.name] = "no file there"
        found = [_file("", file.name, "", file) for file in files]
    for file in found:
        yield from _container_units(source, file, listing)


def _list_remote(source: Source, url: str, listing: Listing) -> list[_Found]:
    import daft

    try:
        found = daft.from_glob_path(url).select("path", "size").to_pydict()
    except (OSError, ValueError) as error:
        listing.unavailable[source.name] = f"cannot be listed: {str(error).splitlines()[0][:120]}"
        print(f"source {source.name}: left out: {url}: {error}", file=sys.stderr)
        return []
    return [
        _Found(Entry("", place.rsplit("/", 1)[-1], "", place), size or 0, f"{place} {size}")
        for place, size in sorted(zip(found["path"], found["size"], strict=True))
    ]


def _list_git(source: Source, listing: Listing) -> Iterator[Unit]:
    """Files of the last commit of a repository, bare or not."""
    root = _folder(source)
    command = ["git", "-C", str(root), "ls-tree", "-r", "-z", "--long", "--full-tree", "HEAD"]
    environment = os.environ | GIT_ENVIRONMENT
    try:
        listed = subprocess.check_output(command, timeout=600, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        listing.unavailable[source.name] = "git cannot read it"
        print(f"source {source.name}: left out: {root}: {error}", file=sys.stderr)
        return
    repository = as_text(root.resolve().name.removesuffix(".git"))
    rows: list[tuple[str, str, int]] = []
    lines = listed.split(b"\0")[:-1]
    for line in lines:
        fields, _, name = line.partition(b"\t")
        mode, _, blob, size = fields.split()
        if mode.startswith(b"100"):  # a regular file; not a link, not a submodule
            rows.append((os.fsdecode(name), blob.decode(), int(size)))
    about = [(p, blob) for p, blob, _ in rows if "/" not in p and LICENCE_FILE.fullmatch(p)]
    texts = [d.content.decode("utf-8", "replace") for d in read_git(str(root), about, 1_000_000)]
    licence = licence_of_metadata(email.message_from_string(""), texts)
    found = [
        _Found(Entry(repository, path, licence, blob), size, blob)
        for path, blob, size in sorted(rows)
        if takes(source, path)
    ]
    listing.n_other[source.name] += len(lines) - len(found)
    yield from _in_units(source, found, location=str(root), repository=repository)
