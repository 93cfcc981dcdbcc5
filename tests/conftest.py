"""What tests share: the public data files where they are present, and a vocabulary where not."""

import os
import sysconfig
from pathlib import Path

import pytest

from codellama.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public benchmark and vocabulary files; tests that need it skip without."""
    folder = Path(os.environ.get("CODELLAMA_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set CODELLAMA_DATA to the folder of public data files")
    return folder


@pytest.fixture(scope="session")
def stdlib_sources() -> list[str]:
    """Some Python modules that every machine has."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    return [path.read_bytes().decode("utf-8", "ignore") for path in files]


@pytest.fixture(scope="session")
def small_tokenizer(stdlib_sources: list[str]) -> Tokenizer:
    """600 pieces learned from the standard library, and the four infilling ids."""
    return Tokenizer.train(stdlib_sources, 600)
