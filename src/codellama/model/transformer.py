"""The network: Code Llama is Llama 2, unchanged. This is the first file to read.

A block computes queries, keys and values, rotates the first two by position, and calls
`attend(layer, q, k, v)`, an argument of the forward pass. So there is no cache, no mask and no
parallelism here, and the same module runs [B, T] tokens in training and a ragged [N] in the engine
(written [..., T] below). Modules carry the names of Hugging Face's Llama, and heads are rotated in
its "rotate half" layout, so that a checkpoint loads without a mapping.

Source: Llama 2 paper 2.2; Code Llama paper 2.4 for the rotary base.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codellama.model.attention import Attend, causal
from codellama.model.config import ModelConfig

Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Scale to unit root mean square in float32, return to the input type, apply the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] -> the same shape and type."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of the rotary angles n * theta^(-2i/Dh), computed in float32.

    Args:
        positions: [..., T] int64.

    Returns:
        Two tensors [..., T, 1, Dh]; both halves of the last axis hold the same angles.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos_sin: Rotation) -> Tensor:
    """Rotate component i with component i + Dh/2. x: [..., T, heads, Dh]."""
    cos, sin = cos_sin
    low, high = x.chunk(2, dim=-1)
    # Under autocast the angles are float32 and x is not; attention wants q, k and v of one type.
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention: Hkv key-value heads, each shared by H / Hkv query heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos_sin: Rotation, attend: Attend) -> Tensor:
        """x: [..., T, D] -> [..., T, D]."""
        # The head count is inferred: under tensor parallelism a rank holds only some heads.
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = attend(self.layer, rotate(q, cos_sin), rotate(k, cos_sin), v)
        return self.o_proj(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., T, D] -> [..., T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-normalised attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos_sin: Rotation, attend: Attend) -> Tensor:
        """x: [..., T, D] -> [..., T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, L blocks and the final norm: tokens to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not nn.Embedding(V, D): its random start is thrown away, and on the meta device, where
        # every loaded model begins, importing what draws it takes 1.1 s.
        table = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens, positions: [..., T] int64 -> [..., T, D]."""
        x = self.embed_tokens(tokens)
        cos_sin = rotation(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for block in self.layers:
            x = block(x, cos_sin, attend)
        return self.norm(x)


class Transformer(nn.Module):
    """The whole model: tokens to logits. `model(tokens)` is plain causal prediction.

    A new one has no useful weights: call `initialise`, or load a state.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, attend: Attend = causal
    ) -> Tensor:
        """Predict the token after each position.

        Args:
            tokens: [B, T] int64.
            positions: [B, T] int64; counted from 0 when not given.
            attend: what each position sees.

        Returns:
            [B, T, V] float32 logits.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        return self.lm_head(self.model(tokens, positions, attend)).float()

    def initialise(self, generator: torch.Generator) -> None:
        """Fill all weights as Llama does: normal(0, initializer_range), norms one.

        The two projections into the residual stream of each block are scaled down by sqrt(2 L), so
        that its variance does not grow with depth (GPT-2 paper 2.3; not stated for Llama).
        """
        for name, parameter in self.named_parameters():
            initialise(name, parameter, self.config, generator)


def initialise(
    name: str, weight: Tensor, config: ModelConfig, generator: torch.Generator
) -> Tensor:
    """Fill one weight of a model in place; see `Transformer.initialise`."""
    if name.endswith("norm.weight"):
        return nn.init.ones_(weight)
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    return nn.init.normal_(weight, std=std, generator=generator)
