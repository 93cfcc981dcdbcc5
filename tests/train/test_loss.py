import pytest
import torch
import torch.nn.functional as F

from codellama.train import loss as loss_module
from codellama.train.loss import CHUNK_TOKENS, chunk_loss, linear_cross_entropy

N, D, V = 300, 24, 131


@pytest.fixture(params=[64, 100, 300, 1024])
def chunk_tokens(request, monkeypatch):
    """Chunks that divide N, that do not, and one that is larger."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", request.param)
    return request.param


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator)
    weights[::3] = 0  # left out, as at the ends of documents
    return hidden, weight, targets, weights / weights.count_nonzero()


def by_torch(hidden, weight, targets, weights):
    losses = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    total = (losses * weights).sum()
    return total.detach(), *torch.autograd.grad(total, (hidden, weight))


def test_value_and_gradients_equal_torch(chunk_tokens):
    hidden, weight, targets, weights = inputs()
    total = linear_cross_entropy(hidden, weight, targets, weights)
    assert total.dtype == torch.float32
    found = (total.detach(), *torch.autograd.grad(total, (hidden, weight)))
    expected = by_torch(hidden.double(), weight.double(), targets, weights)
    for ours, theirs in zip(found, by_torch(hidden, weight, targets, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=0)


def test_bfloat16_stays_close(chunk_tokens):
    hidden, weight, targets, weights = inputs(torch.bfloat16)
    total = linear_cross_entropy(hidden, weight, targets, weights, torch.bfloat16)
    ours = torch.autograd.grad(total, (hidden, weight))
    expected = by_torch(hidden.float(), weight, targets, weights)
    assert total.item() == pytest.approx(expected[0].item(), rel=0.01)
    assert ours[0].dtype == torch.bfloat16
    assert ours[1].dtype == torch.float32
    for a, b in zip(ours, expected[1:], strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_gradient_is_scaled_by_what_comes_from_above():
    hidden, weight, targets, weights = inputs()
    grads = [
        torch.autograd.grad(
            scale * linear_cross_entropy(hidden, weight, targets, weights), (hidden, weight)
        )
        for scale in (1, 3)
    ]
    for one, three in zip(*grads, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_positions_of_no_weight_have_no_influence():
    hidden, weight, targets, weights = inputs()
    total = linear_cross_entropy(hidden, weight, targets, weights)
    changed = torch.where(weights == 0, (targets + 1) % V, targets)
    assert torch.equal(linear_cross_entropy(hidden, weight, changed, weights), total)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert (gradient[weights == 0] == 0).all()
    assert (gradient[weights > 0].abs().sum(-1) > 0).all()


def test_large_logits_do_not_overflow():
    hidden, weight, targets, weights = inputs()
    total = linear_cross_entropy(hidden * 1e3, weight, targets, weights)
    expected = by_torch(hidden * 1e3, weight, targets, weights)[0]
    assert torch.isfinite(total)
    torch.testing.assert_close(total.detach(), expected)


def test_not_finite_inputs_are_not_hidden():
    hidden, weight, targets, weights = inputs()
    with torch.no_grad():
        hidden[1, 0] = float("nan")
    assert linear_cross_entropy(hidden, weight, targets, weights).isnan()


def test_products_are_computed_outside_of_autocast():
    """The dtype is an argument; autocast around the call must not change it."""
    hidden, weight, targets, weights = inputs()
    plain = linear_cross_entropy(hidden, weight, targets, weights)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_cross_entropy(hidden, weight, targets, weights)
    assert torch.equal(plain, inside)


def test_no_tensor_holds_all_logits():
    n, v = 4 * CHUNK_TOKENS, 5000
    hidden = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(v, 8, requires_grad=True)
    targets, weights = torch.zeros(n, dtype=torch.int64), torch.full((n,), 1 / n)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets, weights).backward()
    assert CHUNK_TOKENS * v <= largest < n * v / 3


def test_chunk_is_what_the_caller_gives():
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return chunk_loss(*arguments)

    hidden = torch.randn(2 * CHUNK_TOKENS + 5, 4)
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    linear_cross_entropy(
        hidden, torch.randn(7, 4), targets, torch.ones(len(hidden)), torch.float32, counted
    )
    assert calls == [CHUNK_TOKENS, CHUNK_TOKENS, 5]
