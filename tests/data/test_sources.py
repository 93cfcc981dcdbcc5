import io
import os
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from trees import MIT_TEXT, program, write_tree, write_wheel

from codellama.data import wheels
from codellama.data.archives import UNWANTED, RawDocument
from codellama.data.listing import Listing, list_sources
from codellama.data.sources import read_unit
from codellama.data.wheels import cached_wheel, fetch_wheel
from codellama.recipe import Source


def tree(path: Path, **fields: object) -> tuple[Source, ...]:
    return (Source.model_validate({"name": "tree", "path": str(path), **fields}),)


def documents(listing: Listing, *sources: Source, max_bytes: int = 1_000_000) -> list[RawDocument]:
    named = {source.name: source for source in sources}
    found = [d for unit in listing.units for d in read_unit(unit, named[unit.source], max_bytes)]
    return [document for document in found if document.reason != UNWANTED]


def rows(listing: Listing) -> list[tuple[str, str]]:
    return [(entry.repository, entry.path) for unit in listing.units for entry in unit.entries]


def licences(listing: Listing) -> list[str]:
    return [entry.licence for unit in listing.units for entry in unit.entries]


def test_tree_lists_python_files_per_repository(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "beta/pkg/b.py": program("b"),
            "beta/__pycache__/b.py": program("cached"),
            "beta/.venv/lib/c.py": program("environment"),
            "alpha/a.py": program("a"),
            "alpha/notes.txt": "text",
            "loose.py": program("loose"),
        },
    )
    listing = list_sources(tree(tmp_path), tmp_path / "cache")
    expected = [("alpha", "a.py"), ("beta", "pkg/b.py"), (tmp_path.name, "loose.py")]
    assert rows(listing) == expected
    assert licences(listing) == ["MIT", "MIT", "unknown"]
    assert listing.n_other["tree"] == 5  # notes.txt, two licence files, a cache, an environment


def test_tree_with_a_project_file_is_one_repository(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "project", {"src/a.py": program("a"), "tests/b.py": program("b")})
    (root / "pyproject.toml").write_text("[project]")
    (root / "LICENSE.txt").write_text(MIT_TEXT)
    listing = list_sources(tree(root), tmp_path)
    assert rows(listing) == [("project", "src/a.py"), ("project", "tests/b.py")]
    assert set(licences(listing)) == {"MIT"}


def test_tree_takes_named_packages_and_names_those_it_lacks(tmp_path: Path) -> None:
    write_tree(tmp_path, {"one/a.py": program("a"), "two/b.py": program("b")})
    listing = list_sources(tree(tmp_path, packages=("two", "three")), tmp_path)
    assert rows(listing) == [("two", "b.py")]
    assert list(listing.unavailable) == ["tree/three"]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder \(source 'tree'"):
        list_sources(tree(tmp_path / "nowhere"), tmp_path)


def test_what_is_no_regular_file_is_counted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.py")  # opening it in the plain way would wait for ever
    (tmp_path / "dangling.py").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "above").symlink_to(tmp_path)  # a loop of folders
    (source,) = tree(tmp_path)
    found = documents(list_sources((source,), tmp_path / "cache"), source)
    assert [(d.path, d.reason, d.content) for d in found] == [
        ("dangling.py", "unreadable", b""),
        ("fifo.py", "unreadable", b""),
        ("loop.py", "unreadable", b""),
    ]


def test_links_out_of_a_tree_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text(program("secret"))
    root = write_tree(tmp_path / "tree", {"a/x.py": program("x")})
    (root / "a" / "out.py").symlink_to(tmp_path / "secret.py")
    (root / "a" / "within.py").symlink_to(root / "a" / "x.py")
    (source,) = tree(root)
    found = {d.path: d for d in documents(list_sources((source,), tmp_path), source)}
    assert (found["out.py"].reason, found["out.py"].content) == ("unsafe path", b"")
    assert found["within.py"].content == program("x").encode()


def test_names_that_are_not_utf8_can_be_stored(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.py"), "wb") as file:
        file.write(program("x").encode())
    (source,) = tree(tmp_path)
    (document,) = documents(list_sources((source,), tmp_path / "cache"), source)
    assert document.path == "caf\\udce9.py"
    assert document.content == program("x").encode()


def test_a_file_of_two_gigabytes_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    with open(tmp_path / "huge.py", "wb") as file:
        file.truncate(2 << 30)
    (source,) = tree(tmp_path)
    (document,) = documents(list_sources((source,), tmp_path / "cache"), source, max_bytes=1000)
    assert len(document.content) == 1001


def test_a_new_file_changes_the_units_of_its_neighbours_alone(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"p/m{n}.py": f"# {n}" for n in range(6000)})
    before = list_sources(tree(tmp_path), tmp_path / "cache").units
    (tmp_path / "p" / "m3000b.py").write_text("# new")
    after = list_sources(tree(tmp_path), tmp_path / "cache").units
    assert len(before) > 4
    assert len(set(after) - set(before)) <= 2
    assert sum(len(unit.entries) for unit in after) == 6001


def test_stdlib(tmp_path: Path) -> None:
    listing = list_sources((Source(name="stdlib", kind="stdlib"),), tmp_path)
    paths = {path for _, path in rows(listing)}
    assert "json/decoder.py" in paths
    assert not any("site-packages" in path or path.startswith("/") for path in paths)
    assert {repository for repository, _ in rows(listing)} == {"cpython"}
    assert set(licences(listing)) == {"PSF-2.0"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder with three distributions and an unowned file."""
    site = tmp_path / "site-packages"
    for name, files, licence in (
        ("py-yaml", {"yaml/__init__.py": program("yaml")}, "License: MIT\n"),
        ("gpl-thing", {"thing.py": program("thing")}, "License: GPLv3\n"),
        ("codellama", {"codellama/model.py": program("model")}, "License: Apache-2.0\n"),
    ):
        wheel = write_wheel(tmp_path / "wheels", name, files, licence=licence)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    (site / "stray.py").write_text(program("stray"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(site))
    return site


@pytest.mark.usefixtures("site")
def test_installed_files_belong_to_the_distribution_that_records_them(tmp_path: Path) -> None:
    listing = list_sources((Source(name="installed", kind="installed"),), tmp_path)
    assert [e[:3] for unit in listing.units for e in unit.entries] == [
        ("gpl-thing", "thing.py", "GPL"),
        ("py-yaml", "yaml/__init__.py", "MIT"),
        ("stray", "stray.py", "unknown"),
    ]


def test_cached_wheel_is_read_without_fetching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fetched although it is there")

    monkeypatch.setattr(wheels.subprocess, "run", refuse)
    write_wheel(tmp_path, "Zope.Thing", {"zope/thing.py": program("thing"), "zope/data.txt": "x"})
    (source,) = (Source(name="pypi", kind="pypi", packages=("zope-thing",)),)
    listing = list_sources((source,), tmp_path)
    (document,) = documents(listing, source)
    found = (document.repository, document.path, document.licence)
    assert found == ("zope-thing", "zope/thing.py", "MIT")
    assert document.content == program("thing").encode()
    assert listing.archives == ["Zope.Thing-1.0-py3-none-any.whl"]


def test_pinned_version_is_the_one_taken(tmp_path: Path) -> None:
    old = write_wheel(tmp_path, "thing", {"t.py": program("t")}, version="1.0")
    new = write_wheel(tmp_path, "thing", {"t.py": program("t")}, version="2.0")
    assert cached_wheel("thing==1.0", tmp_path) == old
    assert cached_wheel("Thing", tmp_path) == new
    assert cached_wheel("thing==3.0", tmp_path) is None
    assert cached_wheel("thin", tmp_path) is None


@pytest.mark.parametrize(
    "name", ["--index-url=http://x", "-r", "a b", "../x", "x; rm", "", "x>=1", "./x.whl"]
)
def test_only_package_names_reach_pip(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a package"):
        list_sources((Source(name="pypi", kind="pypi", packages=(name,)),), tmp_path)


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the real pip takes packages from, instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    return folder


def test_fetching_with_pip(local_index: Path, tmp_path: Path) -> None:
    write_wheel(local_index, "thing", {"thing.py": program("thing")})
    wheel = fetch_wheel("thing", tmp_path / "cache")
    assert wheel == tmp_path / "cache" / "thing-1.0-py3-none-any.whl"
    assert wheel.is_file()
    (local_index / wheel.name).unlink()
    assert fetch_wheel("thing", tmp_path / "cache") == wheel  # from the cache: the index has none


def test_one_package_that_fails_does_not_cost_the_others(
    local_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    # A build backend inside the archive: pip needs nothing else to run it.
    members = {
        "pyproject.toml": "[build-system]\nrequires = []\n"
        'build-backend = "evil"\nbackend-path = ["."]\n',
        "evil.py": f"open({str(canary)!r}, 'w')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
    }
    with tarfile.open(local_index / "evil-1.0.tar.gz", "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"evil-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    cache = tmp_path / "cache"
    good = write_wheel(cache, "good", {"good.py": program("good")})
    broken = cache / "broken-1.0-py3-none-any.whl"
    broken.write_bytes(good.read_bytes()[:200])
    source = Source(name="pypi", kind="pypi", packages=("evil", "broken", "good"))
    listing = list_sources((source,), cache)
    found = [(d.repository, d.path, d.reason) for d in documents(listing, source)]
    assert found == [
        ("broken", broken.name, "damaged archive"),
        ("good", "good.py", None),
    ]
    assert list(listing.unavailable) == ["pypi/evil"]
    assert not canary.exists()  # a source distribution is never run
    assert "pypi/evil: left out" in capsys.readouterr().err
