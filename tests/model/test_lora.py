"""Adapters learn, merge exactly, and are PEFT's."""

import pytest
import torch
from tiny_models import TINY, tiny_model

from codellama.model.checkpoint import save_checkpoint
from codellama.model.lora import (
    add_adapters,
    merged_state,
    save_adapter,
)
from codellama.recipe import Lora
from saved_adapter import load_adapter

TOKENS = torch.arange(20).view(2, 10)
SETTINGS = Lora(rank=4, alpha=8.0, targets=("down_proj", "q_proj", "v_proj"))


def new_model():
    return tiny_model(TINY["grouped-query"])


@pytest.fixture
def adapted():
    """A model whose adapters are no longer zero."""
    model = new_model()
    add_adapters(model, SETTINGS, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=generator)
    return model


def test_new_adapters_change_nothing_and_only_they_learn():
    plain, model = new_model(), new_model()
    add_adapters(model, SETTINGS)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    model(TOKENS).square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    n_layers = plain.config.num_hidden_layers
    assert len(learning) == n_layers * 3 * 2
    assert all(name.endswith(("lora_A", "lora_B")) for name in learning)


def test_merged_weights_give_the_same_logits(adapted):
    merged = new_model()
    merged.load_state_dict(merged_state(adapted.state_dict(), SETTINGS))
    assert not torch.allclose(merged(TOKENS), new_model()(TOKENS), atol=1e-3)
    torch.testing.assert_close(merged(TOKENS), adapted(TOKENS), rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(adapted, tmp_path):
    save_adapter(tmp_path / "a", adapted.state_dict(), SETTINGS, "base")
    model = new_model()
    assert load_adapter(tmp_path / "a", model) == SETTINGS
    assert torch.equal(model(TOKENS), adapted(TOKENS))


def test_peft_loads_it(adapted, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    plain = new_model()
    save_checkpoint(tmp_path / "base", plain.config, plain.state_dict(), "float32")
    save_adapter(tmp_path / "a", adapted.state_dict(), SETTINGS, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(adapted(TOKENS), expected, rtol=1e-4, atol=1e-5)
    # And what PEFT saves is in the same layout.
    theirs.save_pretrained(tmp_path / "saved")
    model = new_model()
    load_adapter(tmp_path / "saved", model)
    torch.testing.assert_close(model(TOKENS), adapted(TOKENS), rtol=1e-5, atol=1e-6)
