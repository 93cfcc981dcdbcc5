"""Weights of any kind together with their tokenizer: what every command starts from.

    path or hub name  ->  (Transformer, Tokenizer)

It decides what a path is and puts model and tokenizer together; the formats themselves are in
`model` and `tokenizer`.
"""

from __future__ import annotations

from pathlib import Path

from codellama.model.checkpoint import load_checkpoint
from codellama.model.transformer import Transformer
from codellama.tokenizer import Tokenizer


def load(
    path: str | Path, device: str = "cpu", dtype: str = "bfloat16"
) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer.

    Raises:
        ValueError: nothing there, or something that is damaged or of another kind.
    """
    return load_checkpoint(path, device, dtype), Tokenizer.load(path)
