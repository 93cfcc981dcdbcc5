import pytest
import torch

from codellama.model.quantize import Int4Linear, Int8Linear, quantized


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


def restored(linear):
    """The matrix that an int4 layer multiplies by, read off column by column."""
    dtype = linear.scales_and_zeros.dtype
    return linear(torch.eye(linear.in_features, dtype=dtype)).T.float()


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
    error = (restored(linear).unflatten(1, (-1, group)) - groups).abs()
    assert (error <= 2.0 * step + 0.05 * groups.abs() + 1e-12).all()
    assert error.mean() < 0.27 * step.mean()  # a uniform error of half a step at most: a quarter
    assert linear.weight.numel() == -(-n_out // 16) * 16 * 256 // 2


@pytest.mark.parametrize("shape", [(256,), (1, 256), (70, 256), (2, 3, 256), (0, 256)])
def test_int4_multiplies_by_that_matrix(shape):
    torch.manual_seed(0)
    linear = Int4Linear.quantized(torch.randn(100, 256))
    x = torch.randn(shape)
    torch.testing.assert_close(linear(x), x @ restored(linear).T, atol=1e-3, rtol=1e-3)


def test_smaller_groups_are_closer():
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    errors = [
        float((restored(Int4Linear.quantized(weight, group)) - weight).square().mean())
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
