"""The tokenizer files of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


def write_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.model into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.file.to_bytes())
