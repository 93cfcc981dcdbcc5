"""ModelConfig: the shape of a model, the released models and ours by name, and their arithmetic.

Field names are those of a Hugging Face `config.json`, so that a checkpoint's file reads without a
mapping. Counts of parameters, FLOPs and cache bytes are computed here and nowhere else.

Dimension letters used in every file: B sequences, T positions, S cached positions, N tokens of a
ragged batch, D model width, H query heads, Hkv key-value heads, Dh head width, F feed-forward
width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

_MAX_DIMENSION = 1 << 24  # far above any model; sizes of damaged files stay computable


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama 2 / Code Llama decoder.

    Raises:
        ValueError: a dimension is not positive or does not divide as it must.
    """

    hidden_size: int  # D
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # Hkv
    intermediate_size: int  # F
    vocab_size: int  # V
    rope_theta: float = 1e6
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < float("inf"):
                raise ValueError(f"{field.name} = {value!r}: expected a positive number")
            if field.type == "int" and not isinstance(value, int):
                raise ValueError(f"{field.name} = {value!r}: expected a whole number")
            if field.type == "int" and value > _MAX_DIMENSION:
                raise ValueError(f"{field.name} = {value!r}: expected at most {_MAX_DIMENSION}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} does not divide into an even width for each of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Dh, the width of one head."""
        return self.hidden_size // self.num_attention_heads

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed.

        Raises:
            ValueError: a name is not a field; lists the fields.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in fields:
                raise ValueError(f"unknown model field {name!r}; accepted: {', '.join(fields)}")
        return dataclasses.replace(self, **changes)

    # -- arithmetic -------------------------------------------------------------------------

    @property
    def n_block_matrix_params(self) -> int:
        """Weights of the matrices inside the L blocks."""
        kv_width = self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * self.hidden_size + 2 * self.hidden_size * kv_width
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + feed_forward)

    @property
    def n_params(self) -> int:
        """All parameters, embedding and output projection (untied) included."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.n_block_matrix_params + 2 * self.vocab_size * self.hidden_size + norms

    def forward_flops_per_token(self, n_context: float) -> float:
        """Floating-point operations of one token's forward pass that attends to `n_context`.

        Two per weight of every matrix (the embedding is a look-up), and four per layer, width and
        attended position for scores and weighted values.
        """
        matrices = self.n_block_matrix_params + self.vocab_size * self.hidden_size
        return 2 * matrices + 4 * self.num_hidden_layers * self.hidden_size * n_context

    def train_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward (twice the forward) of a causal sequence, averaged over it.

        Recomputed activations are not counted: this is the useful work that MFU refers to.
        """
        return 3 * self.forward_flops_per_token(seq_len / 2)

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Cache bytes that one position needs over all layers, keys and values."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim
        return int(self.num_hidden_layers * per_layer * bytes_per_value)

    # -- config.json ------------------------------------------------------------------------

    def to_hf(self) -> dict[str, Any]:
        """The contents of a Hugging Face `config.json`.

        Both `rope_theta` and `rope_parameters` are written: Transformers 5 reads the second, other
        readers only the first and would fall back to 10,000 without a word.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self),
            "head_dim": self.head_dim,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }

    @staticmethod
    def from_hf(values: dict[str, Any]) -> ModelConfig:
        """Read the contents of a Hugging Face `config.json`.

        Raises:
            ValueError: not a Llama, a feature that Code Llama does not have, or a missing key.
        """
        if values.get("model_type") != "llama":
            raise ValueError(f"model_type = {values.get('model_type')!r}: only 'llama' is accepted")
        rope = values.get("rope_parameters") or {}
        scaling = values.get("rope_scaling") or {}
        if not isinstance(rope, dict) or not isinstance(scaling, dict):
            raise ValueError("rope_parameters or rope_scaling is not an object")
        for kind in (rope.get("rope_type"), scaling.get("rope_type"), scaling.get("type")):
            if kind not in (None, "default"):
                raise ValueError(f"rope_type = {kind!r}: only 'default' is accepted")
        for key, expected in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("tie_word_embeddings", False),
        ):
            if values.get(key, expected) != expected:
                raise ValueError(f"{key} = {values[key]!r}: only {expected!r} is accepted")
        # The default base of a config that names none is Llama's 10,000, not Code Llama's 1e6.
        theta = rope.get("rope_theta", values.get("rope_theta", 1e4))
        known: dict[str, Any] = {"rope_theta": float(theta) if type(theta) is int else theta}
        for field in dataclasses.fields(ModelConfig):
            if field.name in known:
                continue
            if field.name in values:
                known[field.name] = values[field.name]
            elif field.name == "num_key_value_heads" and "num_attention_heads" in values:
                known[field.name] = values["num_attention_heads"]
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name!r} is missing")
            elif field.name == "max_position_embeddings":
                known[field.name] = 2048  # what LlamaConfig assumes
            elif field.name == "rms_norm_eps":
                known[field.name] = 1e-6  # what LlamaConfig assumes
        config = ModelConfig(**known)
        if values.get("head_dim") not in (None, config.head_dim):
            raise ValueError(f"head_dim = {values['head_dim']}: expected {config.head_dim}")
        return config

    @staticmethod
    def named(name: str) -> ModelConfig:
        """A released model, or one of ours, by name: `7b`, `13b-python`, `70b-instruct`, `tiny`.

        The full names (`codellama/CodeLlama-7b-Python-hf`) are understood too.

        Raises:
            ValueError: unknown name; lists those that exist.
        """
        key = name.lower().rpartition("/")[2].removeprefix("codellama-").removesuffix("-hf")
        if key not in MODELS:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
        return MODELS[key]


def _llama2(size: str) -> ModelConfig:
    """The four Llama 2 shapes (fact sheet 1.2), with Llama 2's own vocabulary."""
    dim, n_layers, n_heads, n_kv_heads, ffn = {
        "7b": (4096, 32, 32, 32, 11008),
        "13b": (5120, 40, 40, 40, 13824),
        "34b": (8192, 48, 64, 8, 22016),
        "70b": (8192, 80, 64, 8, 28672),
    }[size]
    return ModelConfig(dim, n_layers, n_heads, n_kv_heads, ffn, vocab_size=32000)


def _released() -> dict[str, ModelConfig]:
    """The twelve Code Llama models. Source: paper 2.1, released configurations, author's notes."""
    models = {}
    for size in ("7b", "13b", "34b", "70b"):
        for variant in ("", "-python", "-instruct"):
            # The infilling vocabulary exists where the code-training run had infilling: 7B and 13B
            # without Python, and the whole 70B line, whose Python model comes from that same run.
            infilling_vocabulary = size == "70b" or (size in ("7b", "13b") and variant != "-python")
            # 70B Python and Instruct branched off before long-context fine-tuning.
            long_context = not (size == "70b" and variant)
            models[size + variant] = _llama2(size).replace(
                vocab_size=32016 if infilling_vocabulary else 32000,
                rope_theta=1e6 if long_context else 1e4,
                max_position_embeddings=16384 if long_context else 4096,
            )
    return models


# Ours: 8,192 learned pieces and four infilling pieces.
_OURS = {
    # Two CPU cores train it in about two hours.
    "tiny": ModelConfig(256, 6, 4, 2, 768, 8196, rope_theta=1e4, max_position_embeddings=1024),
    # One GPU trains it in 20 minutes; 61 MB in bfloat16.
    "small": ModelConfig(512, 8, 8, 4, 1280, 8196, rope_theta=1e4, max_position_embeddings=2048),
}

MODELS: dict[str, ModelConfig] = {**_OURS, **_released()}
INFILLING_MODELS = ("7b", "13b", "7b-instruct", "13b-instruct", "70b")
"""Released models that were trained to infill and say so (the 70B: sources disagree)."""
