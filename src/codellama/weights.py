"""Weights of any kind together with their tokenizer: what every command starts from.

    Hugging Face folder | Meta folder | .gguf | hub name  ->  (Transformer, Tokenizer)
                                                          ->  another of these formats

It decides what a path is and brings model and tokenizer together; the formats themselves are in
`model` and `tokenizer`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from codellama.model.checkpoint import open_checkpoint
from codellama.model.config import MODELS, ModelConfig
from codellama.model.convert import Progress, Reader, write_gguf_file, write_hf, write_meta
from codellama.model.gguf import open_gguf
from codellama.model.hub import download, is_hub_name
from codellama.model.meta import PARAMS_FILE, open_meta
from codellama.model.source import QUANTIZED, Weights, build_model
from codellama.model.transformer import Transformer
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.gguf_vocabulary import from_gguf, to_gguf
from codellama.tokenizer.model_file import ModelFile
from codellama.tokenizer.variants import VARIANTS

FORMATS = ("hf", "meta", "gguf")


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "bfloat16",
    variant: str | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        path: a Hugging Face folder, a Meta folder, a .gguf file, or a name on the hub.
        dtype: "bfloat16", "float16", "float32", or "int8" (matrices only).
        variant: "7b-instruct" and so on, where nothing in the folder says what the model is.
        allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
        ValueError: nothing there, or something that is damaged or of another kind; names the file
            and the tensor.
    """
    weights = open_weights(path)
    tokenizer = load_tokenizer(weights, variant)
    return build_model(weights, device, dtype, allow_nonfinite), tokenizer


def open_weights(path: str | Path) -> Weights:
    """Find out what a path or name is and open it, reading no weights yet.

    Raises:
        ValueError: it is none of the formats, or it is damaged.
    """
    name, path = str(path), Path(path)
    if not path.exists():
        if not is_hub_name(name):
            raise ValueError(f"{path}: no such file or folder")
        path = download(name)
    if path.is_file():
        if path.suffix.lower() == ".gguf" or _starts_with(path, b"GGUF"):
            return open_gguf(path)
        raise ValueError(f"{path}: expected a folder or a .gguf file")
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder or a file")
    if (path / "config.json").exists():
        return open_checkpoint(path)
    if (path / PARAMS_FILE).exists() or any(path.glob("consolidated.*.pth")):
        return open_meta(path)
    raise ValueError(
        f"{path}: no model: expected config.json (Hugging Face) or {PARAMS_FILE} (Meta)"
    )


def load_tokenizer(weights: Weights, variant: str | None = None) -> Tokenizer:
    """Load the tokenizer that belongs to some weights.

    Raises:
        ValueError: it is missing or damaged, or does not match the embedding.
    """
    path, n_rows = weights.path, weights.config.vocab_size
    try:
        tokenizer = _read_tokenizer(weights, variant or named_variant(weights))
    except ValueError as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from None
    if tokenizer.vocab_size != n_rows:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} pieces, but the embedding {n_rows} "
            "rows; they do not belong together"
        )
    return tokenizer


def _read_tokenizer(weights: Weights, variant: str | None) -> Tokenizer:
    known = weights.extra
    if weights.kind == "gguf":
        return from_gguf(known)
    if weights.kind == "meta" and "chat_format" in known:  # written by `convert`
        file = ModelFile.read(weights.path / "tokenizer.model")
        return Tokenizer(file, known["chat_format"], infilling=bool(known.get("infilling")))
    return Tokenizer.load(weights.path, variant)


def named_variant(weights: Weights) -> str | None:
    """The released variant that a folder's name tells, where the weights have its shape.

    A Meta folder says nowhere else whether its model chats, nor do early Hugging Face folders.
    """
    # In the hub's cache the name is two folders up: models--codellama--CodeLlama-7b-hf.
    for folder in (weights.path, weights.path.absolute().parent.parent):
        name = folder.name.lower().rpartition("--")[2].removeprefix("codellama-")
        name = name.removesuffix("-hf")
        if name in VARIANTS and same_shape(MODELS[name], weights.config):
            return name
    return None


def same_shape(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two models have the same tensors, whatever their context and rotation."""
    context = one.max_position_embeddings
    changed = other.replace(
        max_position_embeddings=context,
        rope_theta=one.rope_theta,
        rms_norm_eps=one.rms_norm_eps,
        initializer_range=one.initializer_range,
    )
    return changed == one


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "hf",
    dtype: str | None = None,
    quantize: str | None = None,
    n_shards: int = 1,
    max_shard_bytes: int = 5_000_000_000,
    variant: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model in another format; `dst` appears only when it is whole.

    Args:
        to: "hf", "meta" or "gguf".
        dtype: "bfloat16", "float16" or "float32"; None keeps the type of the matrices (bfloat16
            where they are quantised).
        quantize: "q8_0" or "q4_0" for GGUF; "int8" or "int4" for a Hugging Face folder, which then
            only this package reads.
        n_shards: for Meta, 1, 2, 4 or 8.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ValueError: an option is wrong, or the source is damaged or of an unknown kind.
        OSError: `dst` cannot be written; nothing is left there.
    """
    dst = Path(dst)
    if to not in FORMATS:
        raise ValueError(f"to = {to!r}: expected one of {', '.join(FORMATS)}")
    for option, given, only in (
        ("quantize", quantize and (to != "hf" or quantize not in QUANTIZED), "gguf"),
        ("n_shards", n_shards != 1, "meta"),
    ):
        if given and to != only:
            raise ValueError(f"{option} is for {only!r} only, not for {to!r}")
    if quantize and dtype:
        raise ValueError("give dtype or quantize, not both")
    weights = open_weights(src)
    if dst.exists() and (dst.resolve() == weights.path.resolve() or not overwrite):
        raise ValueError(f"{dst}: exists already; nothing was written")
    if to != "gguf" and dst.exists() and not dst.is_dir():
        raise ValueError(f"{dst}: is a file, not a folder")
    if to == "gguf" and dst.is_dir():
        raise ValueError(f"{dst}: is a folder; a .gguf file is to be written")
    tokenizer = load_tokenizer(weights, variant)
    reader = Reader(weights, dtype, allow_nonfinite, progress)
    if to == "gguf":
        vocabulary = {"general.name": _model_name(weights), **to_gguf(tokenizer)}
        write_gguf_file(reader, dst, vocabulary, quantize)
        return dst

    def write_tokenizer(folder: Path) -> None:
        if to == "hf":
            tokenizer.save(folder)
        original = weights.path / "tokenizer.model"
        if original.is_file() and _n_pieces(original) == tokenizer.vocab_size:
            shutil.copyfile(original, folder / "tokenizer.model")
        else:
            (folder / "tokenizer.model").write_bytes(tokenizer.file.to_bytes())

    if to == "hf":
        eos: Any = 2 if tokenizer.step_id is None else [2, tokenizer.step_id]
        write_hf(reader, dst, write_tokenizer, max_shard_bytes, eos, quantize)
    else:
        facts = {"chat_format": tokenizer.chat_format, "infilling": tokenizer.supports_infilling}
        write_meta(reader, dst, n_shards, write_tokenizer, **facts)
    return dst


def _n_pieces(path: Path) -> int:
    return len(ModelFile.read(path).pieces)


def _model_name(weights: Weights) -> str:
    """The name for a GGUF file's metadata."""
    if weights.kind == "gguf":
        return str(weights.extra.get("general.name", weights.path.stem))
    return weights.path.absolute().name


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
