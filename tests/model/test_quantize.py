import pytest
import torch

from codellama.model.quantize import Int8Linear


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
