"""Meta's layout: consolidated.NN.pth in 1 to 8 model-parallel shards, params.json, tokenizer.model.

Tensors are cut among the shards by columns or rows, the embedding by its width, and the query and
key rows stand in the order of Meta's rotation, which turns neighbouring components, where Hugging
Face turns component i with component i + Dh/2.

Source: fact sheet 1.5 for names and cuts, 1.8 for the order of rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codellama.artifact import MANIFEST
from codellama.model.config import ModelConfig
from codellama.model.source import DTYPES, Stored, Weights, inside, read_json, short, tensor_shapes
from codellama.model.torch_files import read_torch_file

PARAMS_FILE = "params.json"
SHARD_COUNTS = (1, 2, 4, 8)
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_CUT_BY_COLUMNS = ("model.embed_tokens", "self_attn.o_proj", "mlp.down_proj")
_IGNORED = "rope.freqs"  # a table that follows from params.json
# Every field of a published params.json, of Llama 1 to 3 and Code Llama.
_REQUIRED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier", "rope_theta", "vocab_size", "use_scaled_rope")


def to_hf_name(name: str) -> str | None:
    """Hugging Face's name of one of Meta's tensors; None where there is none."""
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"layers\.(0|[1-9]\d{0,5})\.(\w+(?:\.\w+)?)", stem)
    if kind != "weight":
        return None
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    return f"{_TOP_NAMES[stem]}.weight" if stem in _TOP_NAMES else None


def to_meta_name(name: str) -> str:
    """Meta's name of a Hugging Face tensor."""
    return foreign_name(name, _TOP_NAMES, "layers", _LAYER_NAMES)


def foreign_name(name: str, top: dict[str, str], layers: str, in_layer: dict[str, str]) -> str:
    """The name of a Hugging Face tensor in a format whose own names are keys of theirs."""
    stem = name.removesuffix(".weight")
    found = {hf: own for own, hf in top.items()}.get(stem)
    if found is None:
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        found = f"{layers}.{layer}.{next(own for own, hf in in_layer.items() if hf == rest)}"
    return f"{found}.weight"


def cut_dimension(name: str) -> int | None:
    """The dimension in which a tensor is cut among shards; None for those that all shards hold."""
    if name.endswith("norm.weight"):
        return None
    return 1 if any(part in name for part in _CUT_BY_COLUMNS) else 0


def is_rotated(name: str) -> bool:
    """Whether the rows of a tensor (Hugging Face name) depend on the rotation's layout."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def to_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder query or key rows from Hugging Face's layout to Meta's (and GGUF's)."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder query or key rows from Meta's layout (and GGUF's) to Hugging Face's."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


# -- params.json --------------------------------------------------------------------------------


def parse_params(values: dict[str, Any], vocab_size: int) -> ModelConfig:
    """Read the contents of a params.json.

    Args:
        vocab_size: rows of the embedding, as the file need not name it.

    Raises:
        ValueError: a field is missing, unknown, or has no sensible value.
    """
    for key in _REQUIRED:
        if key not in values:
            raise ValueError(f"{key!r} is missing")
    for key, value in values.items():
        if key not in _REQUIRED + _OPTIONAL:
            raise ValueError(f"unknown field {key!r}; known: {', '.join(_REQUIRED + _OPTIONAL)}")
        # -1 and null both stand for a field that is not given.
        if key in _OPTIONAL and (value is None or (key == "vocab_size" and value == -1)):
            continue
        if key == "use_scaled_rope":
            if value:
                raise ValueError(f"{key!r} is set: Code Llama has no scaled rotation")
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ValueError(f"{key} = {value!r}: expected a positive number")
    stated = values.get("vocab_size", -1)
    if stated not in (None, -1, vocab_size):
        raise ValueError(f"vocab_size = {stated}, but the embedding has {vocab_size} rows")
    theta = float(values.get("rope_theta") or 1e4)  # the default of the reference code
    return ModelConfig(
        hidden_size=values["dim"],
        num_hidden_layers=values["n_layers"],
        num_attention_heads=values["n_heads"],
        num_key_value_heads=values.get("n_kv_heads") or values["n_heads"],
        intermediate_size=_feed_forward_width(
            values["dim"], values["multiple_of"], values.get("ffn_dim_multiplier")
        ),
        vocab_size=vocab_size,
        rope_theta=theta,
        # The rule of Hugging Face's converter; 4,096 is right for Llama 2 and for the two 70B
        # models without long-context training.
        max_position_embeddings=16384 if theta > 1e4 else 4096,
        rms_norm_eps=values["norm_eps"],
    )


def _feed_forward_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer by the rule of the reference code (fact sheet 1.2)."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def write_params(config: ModelConfig) -> dict[str, Any]:
    """The contents of a params.json, with the fields that Code Llama's files have."""
    dim, width = config.hidden_size, config.intermediate_size
    # The values of the released models, else a pair that comes out at any width.
    candidates = [(256, 1.0), (4096, 1.3), (1, (width + 0.5) / int(2 * (4 * dim) / 3))]
    multiple_of, multiplier = next(
        pair for pair in candidates if _feed_forward_width(dim, *pair) == width
    )
    values = {"dim": dim, "n_layers": config.num_hidden_layers}
    values["n_heads"] = config.num_attention_heads
    if config.num_key_value_heads != config.num_attention_heads:
        values["n_kv_heads"] = config.num_key_value_heads
    theta = config.rope_theta
    return values | {
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": int(theta) if theta.is_integer() else theta,
    }


# -- shards -------------------------------------------------------------------------------------


def open_meta(folder: Path) -> Weights:
    """Open a Meta folder.

    Raises:
        ValueError: a shard is missing, in surplus or damaged, or params.json contradicts them.
    """
    found = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    for name in wanted:
        if name not in found:
            raise ValueError(f"{folder / name}: missing; there are {', '.join(found)}")
    if len(found) not in range(1, 9):
        raise ValueError(f"{folder}: {len(found)} shards; expected 1 to 8")
    try:
        params = read_json(inside(folder, PARAMS_FILE))
    except FileNotFoundError:
        raise ValueError(f"{folder / PARAMS_FILE}: missing") from None
    shards = [_read_shard(inside(folder, name)) for name in found]
    first = f"{folder / found[0]}"
    for name, shard in zip(found, shards, strict=True):
        odd = sorted(shard.keys() ^ shards[0].keys())
        if odd:
            raise ValueError(f"{folder / name}: tensor {odd[0]!r} is in one shard, not in all")
    embedding = shards[0].get("model.embed_tokens.weight")
    if embedding is None or embedding.dim() != 2:
        raise ValueError(f"{first}: tensor 'tok_embeddings.weight' is missing or no matrix")
    try:
        config = parse_params(params, embedding.shape[0])
        config, manifest = _with_context(config, folder)
    except ValueError as error:
        raise ValueError(f"{folder / PARAMS_FILE}: {error}") from None
    if embedding.shape[1] * len(shards) != config.hidden_size:
        n_cut = config.hidden_size / embedding.shape[1] if embedding.shape[1] else 0
        raise ValueError(
            f"{folder}: {len(shards)} shards, but the embedding in {found[0]} is cut for "
            f"{n_cut:g}; a shard is missing or in surplus, or dim in {PARAMS_FILE} is wrong"
        )
    return Weights(
        kind="meta",
        path=folder,
        config=config,
        tensors={name: _stored(folder / found[0], name, shards) for name in shards[0]},
        read=lambda name, dtype: _read(shards, config, name, dtype),
        extra=manifest,
    )


def _read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one shard under Hugging Face's names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_torch_file(path).items():
        if name == _IGNORED:
            continue
        hf_name = to_hf_name(name)
        if hf_name is None:
            raise ValueError(f"{path}: tensor {name!r} not part of this model")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{path}: tensor {name!r} has type {short(tensor.dtype)}")
        tensors[hf_name] = tensor
    return tensors


def _with_context(config: ModelConfig, folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Take the context length, for which params.json has no field, from our own manifest."""
    try:
        manifest = read_json(inside(folder, MANIFEST))
    except FileNotFoundError:
        return config, {}
    context = manifest.get("max_position_embeddings", config.max_position_embeddings)
    return config.replace(max_position_embeddings=context), manifest


def _stored(path: Path, name: str, shards: list[dict[str, Tensor]]) -> Stored:
    """Describe the tensor that the parts in all shards make together."""
    parts = [shard[name] for shard in shards]
    cut = cut_dimension(name)
    shape = list(parts[0].shape)
    for shard, part in enumerate(parts):
        if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            raise ValueError(
                f"{path.parent}: tensor {to_meta_name(name)!r} of shard {shard} differs"
            )
        if cut is None and not torch.equal(part, parts[0]):
            raise ValueError(
                f"{path.parent}: tensor {to_meta_name(name)!r} of shard {shard} is not the same "
                "as in the first, though every shard holds a copy"
            )
    if cut is not None and cut < len(shape):
        shape[cut] *= len(parts)
    n_bytes = sum(part.nbytes for part in parts)
    return Stored(tuple(shape), parts[0].dtype, short(parts[0].dtype), n_bytes, str(path.parent))


def _read(
    shards: list[dict[str, Tensor]], config: ModelConfig, name: str, dtype: torch.dtype | None
) -> Tensor:
    cut = cut_dimension(name)
    parts = [shard[name] for shard in shards]
    tensor = parts[0] if cut is None or len(parts) == 1 else torch.cat(parts, dim=cut)
    tensor = tensor.to(dtype) if dtype else tensor
    return to_halves(tensor, config.head_dim) if is_rotated(name) else tensor


def shard_shapes(config: ModelConfig, n_shards: int) -> dict[str, tuple[int, ...]]:
    """The tensors of each of `n_shards` shards, by Meta's names.

    Raises:
        ValueError: the model cannot be cut into so many.
    """
    possible = [n for n in SHARD_COUNTS if not _obstacles(config, n)]
    if n_shards not in possible:
        raise ValueError(
            f"n_shards = {n_shards}: {', '.join(_obstacles(config, n_shards)) or 'not a count'} "
            f"cannot be cut so; possible: {', '.join(map(str, possible))}"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        cut = cut_dimension(name)
        shapes[to_meta_name(name)] = tuple(
            size // n_shards if i == cut else size for i, size in enumerate(shape)
        )
    return shapes


def _obstacles(config: ModelConfig, n_shards: int) -> list[str]:
    """The dimensions that do not divide into shards."""
    names = ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size")
    return [name for name in names if n_shards < 1 or getattr(config, name) % n_shards]


def shard_parts(tensor: Tensor, name: str, n_shards: int, head_dim: int) -> Sequence[Tensor]:
    """The parts that the shards hold of a tensor in Hugging Face's layout (and by its name)."""
    if is_rotated(name):
        tensor = to_neighbours(tensor, head_dim)
    cut = cut_dimension(name)
    return [tensor] * n_shards if cut is None else tensor.chunk(n_shards, dim=cut)


def params_text(config: ModelConfig) -> str:
    """A params.json file."""
    return json.dumps(write_params(config)) + "\n"
