"""One small random model, written in every format."""

from pathlib import Path

import torch

from codellama.model.checkpoint import save_checkpoint
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer
from codellama.tokenizer import Tokenizer
from codellama.tokenizer.model_file import BYTE, CONTROL, UNKNOWN, ModelFile, Piece
from codellama.tokenizer.variants import INFILLING_PIECES

# Everything divides by 8, so that eight shards are possible.
SMALL = ModelConfig(64, 2, 8, 8, 96, 400, rope_theta=1e6, max_position_embeddings=512)


def small_vocabulary(n_pieces: int = 400) -> Tokenizer:
    """Bytes, characters, pairs of letters and the infilling pieces; nothing to train."""
    letters = "etaoinsrhdlu"
    texts = ["▁", *map(chr, range(33, 127)), *(a + b for a in letters for b in letters)]
    texts = texts[: n_pieces - 259 - 4]
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [Piece(text, -float(i)) for i, text in enumerate(texts)]
    return Tokenizer(
        ModelFile((*pieces, *(Piece(text, 0.0, CONTROL) for text in INFILLING_PIECES)))
    )


def random_model(config: ModelConfig = SMALL, seed: int = 0) -> Transformer:
    """Random weights, exact in bfloat16, whose logits are about as large as real ones."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    model.initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(8)
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def write_folder(
    folder: Path, config: ModelConfig = SMALL, dtype: str = "float32", **options
) -> Path:
    """A Hugging Face folder with weights and tokenizer."""
    tokenizer = small_vocabulary(config.vocab_size)
    tensors = random_model(config).state_dict()
    save_checkpoint(folder, config, tensors, dtype, write_more=tokenizer.save, **options)
    return folder


def same_tensors(one: Transformer, other: Transformer) -> bool:
    """Whether two models have the same weights of the same types, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def reference_logits(weights: dict[str, torch.Tensor], config: ModelConfig, tokens: torch.Tensor):
    """The forward pass of Meta's code as the fact sheet (1.6) has it, on Meta's tensors.

    Neighbouring components are rotated together as complex numbers.
    """

    def norm(x, name):
        return (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weights[name]
        )

    def rotated(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    width, n = config.head_dim, len(tokens)
    exponents = torch.arange(0, width, 2) / width
    angles = torch.outer(torch.arange(n), 1.0 / config.rope_theta**exponents)
    turns = torch.polar(torch.ones_like(angles), angles)
    mask = torch.full((n, n), float("-inf")).triu(1)
    repeats = config.num_attention_heads // config.num_key_value_heads
    h = weights["tok_embeddings.weight"][tokens]
    for i in range(config.num_hidden_layers):
        w = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in weights.items()}
        x = norm(h, f"layers.{i}.attention_norm.weight")
        q, k, v = (
            (x @ w[f"attention.{name}.weight"].T).unflatten(-1, (-1, width))
            for name in ("wq", "wk", "wv")
        )
        k = rotated(k).repeat_interleave(repeats, dim=1)
        v = v.repeat_interleave(repeats, dim=1)
        scores = torch.einsum("qhd,khd->hqk", rotated(q), k) / width**0.5 + mask
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        h = h + out @ w["attention.wo.weight"].T
        x = norm(h, f"layers.{i}.ffn_norm.weight")
        gate, up = (x @ w[f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        h = h + (torch.nn.functional.silu(gate) * up) @ w["feed_forward.w2.weight"].T
    return norm(h, "norm.weight") @ weights["output.weight"].T
