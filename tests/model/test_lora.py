"""Adapters learn, merge exactly, and are PEFT's."""

import json

import pytest
import torch
from tiny_models import TINY, tiny_model

from codellama.model.checkpoint import save_checkpoint
from codellama.model.lora import (
    add_adapters,
    load_adapter,
    merged_state,
    save_adapter,
)
from codellama.recipe import Lora

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
    # And what PEFT saves is read here.
    theirs.save_pretrained(tmp_path / "saved")
    model = new_model()
    load_adapter(tmp_path / "saved", model)
    torch.testing.assert_close(model(TOKENS), adapted(TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type = 'IA3' is not supported"),
        ("bias", "all", "bias = 'all' is not supported"),
        ("use_dora", True, "use_dora = True is not supported"),
        ("target_modules", ["q_proj", "embed"], "target_modules: Input should be 'q_proj'"),
        ("target_modules", ["q_proj", "v_proj"], "is not part of this model"),
        ("target_modules", ["q_proj", "k_proj", "v_proj", "down_proj"], "is missing"),
        ("r", 8, "has shape"),
        ("r", None, "adapter_config.json"),
    ],
)
def test_folders_that_do_not_fit(adapted, tmp_path, key, value, message):
    save_adapter(tmp_path / "a", adapted.state_dict(), SETTINGS, "base")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(tmp_path / "a", new_model())
    assert str(tmp_path / "a") in str(error.value)


def test_what_is_no_adapter(tmp_path, adapted):
    with pytest.raises(ValueError, match="not an adapter folder"):
        load_adapter(tmp_path, new_model())
    save_adapter(tmp_path / "a", adapted.state_dict(), SETTINGS, "base")
    file = tmp_path / "a/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(tmp_path / "a", new_model())
