"""The compiled products of integers against the same arithmetic in PyTorch."""

import pytest
import torch
from rounding import matrix_of, rounded

from codellama.engine.native import FEW_ROWS, _Pace, attach, library
from codellama.model.config import ModelConfig
from codellama.model.quantize import Int4Linear, Int8Linear
from codellama.model.transformer import Transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [8, 32, 64, 128])
@pytest.mark.parametrize("sizes", [(33, 256, 770), (9, 128, 67), (70, 384, 32), (130, 2048, 129)])
def test_many_rows(sizes, kind, dtype):
    n_rows, n_in, n_out = sizes
    torch.manual_seed(0)
    weight = torch.randn(n_out, n_in).to(dtype)
    linear = Int8Linear.quantized(weight) if kind == 8 else Int4Linear.quantized(weight, kind)
    model = Transformer(ModelConfig(32, 1, 1, 1, 32, 8))
    model.lm_head = linear
    attach(model, True)
    if library() is None or linear.multiply is None:
        pytest.skip("no C++ compiler")
    x = torch.randn(n_rows, n_in).to(dtype) * torch.logspace(-3, 3, n_rows)[:, None].to(dtype)
    got = linear.multiply(x)
    if got is None:
        pytest.skip("no matrix unit for integers")
    expected = rounded(x.float()) @ matrix_of(linear).T
    error = (got.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < (1e-3 if dtype == torch.float32 else 5e-3)
    # A row does not depend on the others.
    assert torch.equal(linear.multiply(x[-5:]), got[-5:])
    assert linear.multiply(x[:FEW_ROWS]) is None
    x[1, 5] = float("nan")
    assert linear.multiply(x)[1].isnan().all()
    attach(model, False)
    assert linear.multiply is None


def test_short_passes_take_as_many_threads_as_were_faster():
    pace, seconds = _Pace(trial_every=10), {1: 1.0, 2: 0.7}

    def chosen(n_passes, n_rows=1):
        found = []
        for _ in range(n_passes):
            found.append(pace.choose(n_rows, 2))
            pace.note(n_rows, found[-1], seconds[found[-1]])
        return found

    assert chosen(9) == [2, 1, 1, 2, 2, 1, 1, 2, 2], "both are tried"
    assert chosen(9, n_rows=32)[:6] == [2, 1, 1, 2, 2, 1], "and anew for passes of another size"
    seconds[2] = 3.0  # another program began
    assert chosen(40)[-5:] == [1] * 5
    seconds[2] = 0.7
    assert chosen(40)[-5:] == [2] * 5, "trials find that it ended"
    late, before = _Pace(trial_every=10), 1
    for i in range(40):  # after a pass of one thread the others sleep, and are late for the next
        found = late.choose(1, 2)
        late.note(1, found, 1.0 if found == 1 or before == 1 else 0.7)
        before = found
        assert i < 8 or found == 2 or i % 10 in (9, 0), "and still both are measured rightly"
    assert 4 in [pace.choose(1, 4) for _ in range(3)], "another number of threads is tried too"
