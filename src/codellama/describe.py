"""What some weights are, read from their files without loading them: `codellama inspect`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from codellama.model.config import MODELS, ModelConfig
from codellama.model.source import LOAD_DTYPES, check_tensors, stored_shapes
from codellama.tokenizer.variants import VARIANTS
from codellama.weights import load_tokenizer, named_variant, open_weights, same_shape


@dataclass(frozen=True)
class Description:
    """A model in files. Bytes are bytes, contexts are tokens."""

    path: Path
    kind: str  # "hf", "meta" or "gguf"
    variants: tuple[str, ...]  # the released models (or ours) that it may be; most often one
    config: ModelConfig
    n_params: int
    context: int
    rope_theta: float
    vocab_size: int
    infilling: bool
    chat_format: str | None  # "inst", "source", or None
    precisions: dict[str, int]  # stored type -> parameters of that type
    file_bytes: int
    memory_bytes: dict[str, dict[int, int]]  # precision to load in -> context -> weights and cache


def describe(path: str | Path, variant: str | None = None) -> Description:
    """Read what a Hugging Face folder, a Meta folder, a .gguf file or a hub name holds.

    Raises:
        ValueError: nothing there, or something that is damaged or of another kind.
    """
    weights = open_weights(path)
    check_tensors(weights)
    tokenizer = load_tokenizer(weights, variant)
    config = weights.config
    precisions: Counter[str] = Counter()
    for stored in weights.tensors.values():
        precisions[stored.precision] += math.prod(stored.shape)
    hint = variant or named_variant(weights)
    contexts = _contexts(config)
    return Description(
        path=weights.path,
        kind=weights.kind,
        variants=recognise(config, tokenizer.chat_format, hint),
        config=config,
        n_params=config.n_params,
        context=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        vocab_size=config.vocab_size,
        infilling=tokenizer.supports_infilling,
        chat_format=tokenizer.chat_format,
        precisions=dict(precisions),
        file_bytes=sum(stored.n_bytes for stored in weights.tensors.values()),
        memory_bytes={
            dtype: {
                context: weight_bytes(config, dtype) + _cache_bytes(config, dtype, context)
                for context in contexts
            }
            for dtype in LOAD_DTYPES
        },
    )


def recognise(
    config: ModelConfig, chat_format: str | None, hint: str | None = None
) -> tuple[str, ...]:
    """The known models of a shape, rotary base and chat format.

    34B and 34B Python, for example, differ in nothing but their weights and name.
    """
    names = tuple(
        name
        for name, known in MODELS.items()
        if same_shape(known, config)
        and known.rope_theta == config.rope_theta
        and (name not in VARIANTS or VARIANTS[name].chat_format == chat_format)
    )
    return (hint,) if hint in names else names


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Memory of the weights when loaded as `dtype`."""
    tensors = stored_shapes(config, dtype).values()
    return sum(math.prod(shape) * stored.itemsize for shape, stored in tensors)


def _cache_bytes(config: ModelConfig, dtype: str, context: int) -> int:
    itemsize = 4 if dtype == "float32" else 2
    return context * config.kv_bytes_per_token(itemsize)


def _contexts(config: ModelConfig) -> list[int]:
    """Lengths worth a line: usual ones, the model's own, and what it was shown to reach."""
    own = config.max_position_embeddings
    # Models trained on 16,384 tokens with a base of 1e6 work up to 100,000 (paper 3.3).
    reach = 100_000 if config.rope_theta >= 1e6 and own >= 16_384 else own
    return sorted({n for n in (1024, 4096, 16_384, own, reach) if n <= reach})
