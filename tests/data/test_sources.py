import io
import os
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from trees import MIT_TEXT, program, write_tree, write_wheel

from codellama.data import sources
from codellama.data.sources import cached_wheel, fetch_wheel, list_sources, read_file
from codellama.recipe import Source


def tree(path: Path, **fields: object) -> tuple[Source, ...]:
    return (Source.model_validate({"name": "tree", "path": path, **fields}),)


def rows(listing: sources.Listing) -> list[tuple[str, str]]:
    return [(file.repository, file.path) for file in listing.files]


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
    assert [file.licence for file in listing.files] == ["MIT", "MIT", "unknown"]


def test_tree_with_a_project_file_is_one_repository(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "project", {"src/a.py": program("a"), "tests/b.py": program("b")})
    (root / "pyproject.toml").write_text("[project]")
    (root / "LICENSE.txt").write_text(MIT_TEXT)
    listing = list_sources(tree(root), tmp_path)
    assert rows(listing) == [("project", "src/a.py"), ("project", "tests/b.py")]
    assert {file.licence for file in listing.files} == {"MIT"}


def test_tree_takes_named_packages_and_names_those_it_lacks(tmp_path: Path) -> None:
    write_tree(tmp_path, {"one/a.py": program("a"), "two/b.py": program("b")})
    listing = list_sources(tree(tmp_path, packages=("two", "three")), tmp_path)
    assert rows(listing) == [("two", "b.py")]
    assert list(listing.unavailable) == ["tree/three"]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder \(source 'tree'"):
        list_sources(tree(tmp_path / "nowhere"), tmp_path)


def test_what_is_no_regular_file_is_listed_as_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.py")  # opening it in the plain way would wait for ever
    (tmp_path / "dangling.py").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    listing = list_sources(tree(tmp_path), tmp_path)
    assert len(listing.files) == 3
    for file in listing.files:
        assert file.crc == -1
        with pytest.raises(OSError, match=r"fifo|dangling|loop"):
            read_file(file.location, file.member, 1000)


def test_names_that_are_not_utf8_can_be_stored(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.py"), "wb") as file:
        file.write(program("x").encode())
    (file,) = list_sources(tree(tmp_path), tmp_path).files
    assert file.path == "caf\\udce9.py"
    assert read_file(file.location, file.member, 10_000) == program("x").encode()


def test_stdlib(tmp_path: Path) -> None:
    listing = list_sources((Source(name="stdlib", kind="stdlib"),), tmp_path)
    paths = {file.path for file in listing.files}
    assert "json/decoder.py" in paths
    assert not any("site-packages" in path or path.startswith("/") for path in paths)
    assert {(file.repository, file.licence) for file in listing.files} == {("cpython", "PSF-2.0")}


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
    assert [(f.repository, f.path, f.licence) for f in listing.files] == [
        ("gpl-thing", "thing.py", "GPL"),
        ("py-yaml", "yaml/__init__.py", "MIT"),
        ("stray", "stray.py", "unknown"),
    ]


def test_cached_wheel_is_read_without_fetching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fetched although it is there")

    monkeypatch.setattr(sources.subprocess, "run", refuse)
    write_wheel(tmp_path, "Zope.Thing", {"zope/thing.py": program("thing"), "zope/data.txt": "x"})
    (source,) = (Source(name="pypi", kind="pypi", packages=("zope-thing",)),)
    listing = list_sources((source,), tmp_path)
    (file,) = listing.files
    assert (file.repository, file.path, file.licence) == ("zope-thing", "zope/thing.py", "MIT")
    assert read_file(file.location, file.member, 10_000) == program("thing").encode()
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
    (source,) = tree(tmp_path)
    source = Source(name="pypi", kind="pypi", packages=("evil", "broken", "good"))
    listing = list_sources((source,), cache)
    assert rows(listing) == [("good", "good.py")]
    assert list(listing.unavailable) == ["pypi/evil", "pypi/broken"]
    assert not canary.exists()  # a source distribution is never run
    assert "pypi/evil: left out" in capsys.readouterr().err


def test_a_member_is_never_read_beyond_the_limit(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "bomb", {"bomb.py": "#" * 50_000_000})
    assert wheel.stat().st_size < 100_000
    assert len(read_file(os.fsencode(wheel), "bomb.py", 1000)) == 1001


def test_a_damaged_member_is_an_os_error(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "flipped", {"flipped.py": program("flipped", 200)})
    content = bytearray(wheel.read_bytes())
    content[300] ^= 0xFF  # inside the compressed data of the first member
    wheel.write_bytes(content)
    with pytest.raises(OSError, match=r"flipped\.py"):
        read_file(os.fsencode(wheel), "flipped.py", 1_000_000)
