"""The vocabulary in the metadata of a GGUF file: from and to a Tokenizer.

Values in and out are plain: lists of strings, arrays of numbers, numbers and flags, by the keys of
the format. Reading and writing the file is not done here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .huggingface import TEMPLATES
from .model_file import BYTE, ModelFile, Piece
from .tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Our own key: the vocabulary of 70B Python has the infilling pieces, though it does not infill.
_INFILLING = "codellama.infilling"


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Raises:
        ValueError: no vocabulary of the Llama kind, or a damaged one; names the key.
    """

    def value(name: str, default: Any = None) -> Any:
        return metadata.get(_PREFIX + name, default)

    if value("model") != "llama":
        raise ValueError(f"{_PREFIX}model = {value('model')!r}: only 'llama' is accepted")
    texts, scores, kinds = value("tokens"), value("scores"), value("token_type")
    if not isinstance(texts, list):
        raise ValueError(f"{_PREFIX}tokens is missing or no list of strings")
    for name, numbers in (("scores", scores), ("token_type", kinds)):
        if not isinstance(numbers, np.ndarray) or len(numbers) != len(texts):
            raise ValueError(f"{_PREFIX}{name}: expected {len(texts)} numbers")
    for name, expected in (("bos", 1), ("eos", 2), ("unknown", 0)):
        if value(f"{name}_token_id", expected) != expected:
            found = value(f"{name}_token_id")
            raise ValueError(f"{_PREFIX}{name}_token_id = {found}: only {expected} is accepted")
    pieces = [
        # Some converters gave bytes a score, which never matters.
        Piece(text, 0.0 if kind == BYTE else score, kind)
        for text, score, kind in zip(texts, scores.tolist(), kinds.tolist(), strict=True)
    ]
    if not all(math.isfinite(piece.score) for piece in pieces):
        raise ValueError(f"{_PREFIX}scores holds a value that is not a finite number")
    file = ModelFile(tuple(pieces), add_dummy_prefix=bool(value("add_space_prefix", True)))
    chat_format = "inst" if "[INST]" in str(metadata.get(_TEMPLATE)) else None
    return Tokenizer(file, chat_format, infilling=bool(metadata.get(_INFILLING, True)))


def to_gguf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata that describes a tokenizer.

    The ids for infilling are written under the new and the old names, and the end of infilling
    explicitly: llama.cpp looks for it by a spelling that Code Llama does not have.
    """
    pieces = tokenizer.file.pieces
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in pieces],
        "scores": np.array([piece.score for piece in pieces], dtype=np.float32),
        "token_type": np.array([piece.kind for piece in pieces], dtype=np.int32),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "unknown_token_id": tokenizer.unk_id,
        "padding_token_id": tokenizer.unk_id,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": tokenizer.add_dummy_prefix,
        "fim_pre_token_id": tokenizer.prefix_id,
        "fim_suf_token_id": tokenizer.suffix_id,
        "fim_mid_token_id": tokenizer.middle_id,
        "prefix_token_id": tokenizer.prefix_id,
        "suffix_token_id": tokenizer.suffix_id,
        "middle_token_id": tokenizer.middle_id,
    }
    # A file has one "end of turn" and one "end of message"; generation stops at both.
    ends = [i for i in (tokenizer.eot_id, tokenizer.step_id) if i is not None]
    values |= dict(zip(("eot_token_id", "eom_token_id"), ends, strict=False))
    metadata = {_PREFIX + name: value for name, value in values.items() if value is not None}
    metadata[_INFILLING] = tokenizer.supports_infilling
    if tokenizer.chat_format is not None:
        metadata[_TEMPLATE] = TEMPLATES[tokenizer.chat_format]
    return metadata
