"""Block formats against the gguf package, bit for bit."""

import numpy as np
import pytest
import torch

from codellama.model.gguf_blocks import BY_NAME, FORMATS, dequantize, quantize

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", BY_NAME)
def test_any_bytes_mean_the_same_numbers(name):
    form, kind = BY_NAME[name], gguf.GGMLQuantizationType[name]
    assert kind.value == form.number
    assert gguf.GGML_QUANT_SIZES[kind] == (form.n_values, form.n_bytes)
    data = np.random.default_rng(0).integers(0, 256, (300, form.n_bytes * 4), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold NaN and infinite scales too
        expected = gguf.quants.dequantize(data, kind).flatten()
    got = dequantize(torch.from_numpy(data).flatten(), form, torch.float32).numpy()
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_numbers_become_the_same_bytes(name):
    x = np.random.default_rng(1).standard_normal((300, 256)).astype(np.float32)
    x[5] = 0  # a block without a scale
    x[7, :32] = 1
    x[8] = np.round(x[8] * 4) / 2  # many halves, and ties for the largest
    x[9] = -np.abs(x[9])
    x[10] *= 1e-30
    kind = gguf.GGMLQuantizationType[name]
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x, kind)
    got = quantize(torch.from_numpy(x), BY_NAME[name]).numpy()
    assert np.array_equal(got, expected.flatten())


def test_parts_of_large_tensors_join(monkeypatch):
    x = torch.randn(64, 96)
    whole = quantize(x, BY_NAME["Q8_0"])
    values = dequantize(whole, BY_NAME["Q8_0"], torch.bfloat16)
    monkeypatch.setattr("codellama.model.gguf_blocks._CHUNK_VALUES", 100)
    assert torch.equal(quantize(x, BY_NAME["Q8_0"]), whole)
    assert torch.equal(dequantize(whole, BY_NAME["Q8_0"], torch.bfloat16), values)
    assert (values.float() - x.flatten()).abs().max() < 0.03


def test_numbers_are_unique():
    assert len(FORMATS) == len(BY_NAME) == 11
