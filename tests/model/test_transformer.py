import subprocess
import sys

import pytest
import torch
from tiny_models import TINY, tiny_model

from codellama.model.config import ModelConfig
from codellama.model.transformer import RMSNorm, Transformer, rotate, rotation


def hugging_face(model: Transformer):
    """Transformers' model with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_hf()))
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.eval()


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("shape", TINY)
def test_logits_equal_transformers(shape, theta):
    model = tiny_model(TINY[shape].replace(rope_theta=theta))
    tokens = torch.randint(0, 67, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), hugging_face(model)(tokens).logits
    assert ours.dtype == torch.float32
    assert ours.std() > 1  # so that the comparison below can fail
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()


def test_the_rotary_base_matters():
    config = TINY["multi-head"]
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        low, high = (tiny_model(config.replace(rope_theta=t))(tokens) for t in (1e4, 1e6))
    assert (low - high).abs().max() > 0.01 * low.std()


@pytest.mark.parametrize("shape", TINY)
def test_gradients_equal_transformers(shape):
    model = tiny_model(TINY[shape])
    theirs = hugging_face(model)
    tokens = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(1))
    for module in (model, theirs):
        out = module(tokens)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        expected = wanted[name].grad
        assert (parameter.grad - expected).abs().max() <= 1e-4 * expected.std(), name


def test_bfloat16_stays_close_to_float32():
    model = tiny_model(TINY["grouped-query"])
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        exact = model(tokens)
        rounded = model.to(torch.bfloat16)(tokens)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).std() < 0.1 * exact.std()


def test_ragged_tokens_with_an_attend_of_the_caller():
    """Two sequences of different lengths in one [N], as the engine runs them."""
    model = tiny_model(TINY["grouped-query"])
    first, second = torch.arange(7), torch.arange(20, 33)
    layers = []

    def attend(layer, q, k, v):
        assert q.shape == (20, 4, 8)
        assert k.shape == v.shape == (20, 2, 8)
        layers.append(layer)
        out = torch.empty_like(q)
        for span in (slice(0, 7), slice(7, 20)):
            keys, values = (x[span].repeat_interleave(2, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[span], keys) / 8**0.5
            n = scores.shape[-1]
            scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
            out[span] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out

    positions = torch.cat((torch.arange(7), torch.arange(13)))
    with torch.no_grad():
        ragged = model(torch.cat((first, second)), positions, attend)
        alone = torch.cat((model(first[None])[0], model(second[None])[0]))
    assert layers == [0, 1, 2]
    assert ragged.shape == (20, 67)
    torch.testing.assert_close(ragged, alone, rtol=0, atol=2e-5 * alone.std().item())


def test_ragged_tokens_without_positions():
    model = tiny_model(TINY["multi-head"])
    tokens = torch.arange(9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), model(tokens[None])[0])


def test_a_later_token_changes_nothing_before_it():
    model = tiny_model(TINY["grouped-query"])
    tokens = torch.arange(30)[None]
    changed = tokens.clone()
    changed[0, 20] = 60
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:20], after[:20])
    assert ((before[20:] - after[20:]).abs().amax(-1) > 0.01).all()


def test_rotation_is_computed_in_float32_and_returned_in_the_type():
    cos, sin = rotation(torch.tensor([[0, 100_000]]), 8, 1e6, torch.bfloat16)
    assert cos.shape == sin.shape == (1, 2, 1, 8)
    assert cos.dtype == torch.bfloat16
    angle = torch.tensor(100_000 * 1e6 ** (-2 / 8), dtype=torch.float64)
    assert abs(cos[0, 1, 0, 1].double() - angle.cos()) < 0.01
    assert torch.equal(cos[..., :4], cos[..., 4:])


def test_rotation_is_relative():
    x, y = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(at_x, at_y):
        rotated = [
            rotate(z, rotation(torch.tensor([[at]]), 8, 1e4, torch.float32))
            for z, at in ((x, at_x), (y, at_y))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100))
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_norm_is_computed_in_float32_and_weighted_in_the_input_type():
    norm = RMSNorm(4, 1e-5).to(torch.bfloat16)
    x = torch.tensor([[300.0, 0.1, -2.0, 7.0]], dtype=torch.bfloat16)
    exact = x.double() / (x.double().square().mean() + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.to(torch.bfloat16))


def test_initial_weights_come_from_the_seed():
    config = ModelConfig(64, 4, 4, 2, 128, 600)

    def weights(seed):
        model = Transformer(config)
        model.initialise(torch.Generator().manual_seed(seed))
        return model.state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert abs(first["model.embed_tokens.weight"].std() / 0.02 - 1) < 0.05
    scaled = 0.02 / 8**0.5  # two residual branches in each of four layers
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert abs(first[f"model.layers.1.{name}.weight"].std() / scaled - 1) < 0.1
    assert torch.equal(first["model.norm.weight"], torch.ones(64))


def test_a_model_on_the_meta_device_is_cheap():
    """Every loaded model begins there; drawing random weights imports 800 modules, 1.1 s."""
    program = (
        "import sys, torch, codellama.model.transformer as t, codellama.model.config as c\n"
        "with torch.device('meta'): t.Transformer(c.ModelConfig.named('7b'))\n"
        "print('sympy' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
