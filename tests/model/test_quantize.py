import pytest
import torch
from safetensors.torch import load_file, save_file

from codellama.model.checkpoint import save_checkpoint
from codellama.model.config import ModelConfig
from codellama.model.quantize import Int4Linear, Int8Linear, quantized
from codellama.model.transformer import Transformer
from codellama.weights import convert, load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_the_matrix(dtype):
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    weight[3] = 0
    weight[4] *= 1e-6
    weight[5] *= 1e4
    linear = Int8Linear.quantized(weight.to(dtype))
    assert (linear.in_features, linear.out_features) == (64, 96)
    assert linear.weight.dtype == torch.int8
    restored = linear.weight.float() * linear.scale.float()[:, None]
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert (
        (restored - weight).abs() <= largest / 127 * (0.51 if dtype == torch.float32 else 1.1)
    ).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (8, 64), (9, 64), (2, 5, 64), (0, 64)])
def test_both_kernels_multiply_by_the_same_matrix(shape, dtype):
    torch.manual_seed(0)
    linear = Int8Linear.quantized(torch.randn(96, 64).to(dtype))
    x = torch.randn(shape).to(dtype)
    expected = x.float() @ (linear.weight.float() * linear.scale.float()[:, None]).T
    got = linear(x)
    assert got.shape == (*shape[:-1], 96)
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_in", [8, 40, 56])
def test_widths_that_the_packed_kernel_cannot_do(n_in, dtype):
    torch.manual_seed(0)
    linear = Int8Linear.quantized(torch.randn(67, n_in).to(dtype))
    x = torch.randn(3, n_in).to(dtype)
    expected = x.float() @ (linear.weight.float() * linear.scale.float()[:, None]).T
    torch.testing.assert_close(linear(x).float(), expected, rtol=0.02, atol=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("n_out", [1, 64, 100])
def test_int4_is_within_half_a_step(group, n_out, dtype):
    """Or a little more at the ends, where clipping makes all other steps smaller."""
    torch.manual_seed(0)
    weight = torch.randn(n_out, 256).to(dtype)
    weight[0, :group] = 0
    linear = Int4Linear.quantized(weight, group)
    groups = weight.float().unflatten(1, (-1, group))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    error = (linear.dequantized(torch.float32).unflatten(1, (-1, group)) - groups).abs()
    assert (error <= 2.0 * step + 0.05 * groups.abs() + 1e-12).all()
    assert error.mean() < 0.27 * step.mean()  # a uniform error of half a step at most: a quarter
    assert linear.weight.numel() == n_out * 256 // 2


def written_out(linear):
    """The matrix of an int4 layer, weight by weight, as the format says it lies."""
    rows = []
    for integers, (scales, lows) in zip(linear.weight, linear.scales.float(), strict=True):
        row = []
        for i in range(linear.in_features):
            place = i % 32 // 4 * 8 + i % 64 // 32 * 4 + i % 4
            byte = int(integers[i // 64 * 32 + place % 32])
            group = i // linear.group
            row.append(lows[group] + scales[group] * (byte >> 4 if place >= 32 else byte & 15))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_lies_as_the_format_says(group):
    torch.manual_seed(1)
    linear = Int4Linear.quantized(torch.randn(3, 384 if group > 32 else 288), group)
    assert torch.equal(linear.dequantized(torch.float32), written_out(linear))


@pytest.mark.parametrize("shape", [(256,), (1, 256), (70, 256), (2, 3, 256), (0, 256)])
def test_int4_multiplies_by_that_matrix(shape):
    torch.manual_seed(0)
    linear = Int4Linear.quantized(torch.randn(100, 256))
    x = torch.randn(shape)
    torch.testing.assert_close(linear(x), x @ written_out(linear).T, atol=1e-3, rtol=1e-3)


def test_smaller_groups_are_closer():
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    errors = [
        float(
            (Int4Linear.quantized(weight, group).dequantized(weight.dtype) - weight).square().mean()
        )
        for group in (32, 64, 128)
    ]
    eight = Int8Linear.quantized(weight)
    errors.insert(0, float((eight.weight * eight.scale[:, None] - weight).square().mean()))
    assert errors == sorted(errors)


def test_int4_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="group = 48: expected one of 32, 64, 128"):
        Int4Linear.quantized(torch.zeros(16, 96), 48)
    with pytest.raises(ValueError, match="96 inputs do not divide into groups of 64"):
        Int4Linear.quantized(torch.zeros(16, 96), 64)


def test_what_int4_cannot_hold_is_int8():
    assert isinstance(quantized(torch.zeros(16, 64), "int4"), Int4Linear)
    assert isinstance(quantized(torch.zeros(16, 48), "int4"), Int8Linear)
    assert isinstance(quantized(torch.zeros(16, 64), "int4", is_head=True), Int8Linear)
    assert isinstance(quantized(torch.zeros(16, 64), "int8"), Int8Linear)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_in_a_checkpoint_are_those_of_loading(precision, tmp_path, small_tokenizer):
    config = ModelConfig(96, 2, 4, 2, 160, small_tokenizer.vocab_size)
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 5, 9, 300]])
    source, target = tmp_path / "plain", tmp_path / precision
    save_checkpoint(source, config, model.state_dict(), write_more=small_tokenizer.save)
    convert(source, target, quantize=precision, max_shard_bytes=30_000)
    assert len(list(target.glob("*.safetensors"))) > 1
    loaded, again = load(source, dtype=precision)[0], load(target, dtype=precision)[0]
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in again.state_dict().items()
    }
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(loaded(tokens), again(tokens))
    plain = load(target, dtype="float32")[0]  # written out
    wide = again.to(torch.float32) if precision == "int4" else None
    if wide is not None:
        torch.testing.assert_close(plain(tokens), wide(tokens), atol=1e-3, rtol=1e-3)
    n_bytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert n_bytes < sum(file.stat().st_size for file in source.glob("*.safetensors"))
    convert(target, tmp_path / "back", dtype="float32")
    back = load(tmp_path / "back", dtype="float32")[0]
    assert torch.equal(back(tokens), plain(tokens))


def test_damaged_integers_are_named(tmp_path, small_tokenizer):
    config = ModelConfig(64, 1, 4, 2, 128, small_tokenizer.vocab_size)
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "m", config, model.state_dict(), write_more=small_tokenizer.save)
    convert(tmp_path / "m", tmp_path / "q", quantize="int4")
    file = tmp_path / "q" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.mlp.down_proj"
    for changes, message in (
        ({f"{name}.scales": None}, f"{name}.weight' holds integers but has no '{name}.scales'"),
        ({f"{name}.scales": whole[f"{name}.scales"][:, :, :3].clone()}, "expected bfloat16"),
        ({f"{name}.scales": whole[f"{name}.scales"] * torch.nan}, "NaN or infinite"),
        ({f"{name}.weight": whole[f"{name}.weight"][:, 1:].clone()}, "63 bytes a row"),
        (
            {"lm_head.scale": whole["lm_head.scale"][1:].clone()},
            "lm_head.weight.*expected bfloat16",
        ),
    ):
        changed = {k: v for k, v in (whole | changes).items() if v is not None}
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "q", dtype="int4")
    with pytest.raises(ValueError, match="quantize is for 'gguf' only"):
        convert(tmp_path / "m", tmp_path / "r", quantize="q4_0")
