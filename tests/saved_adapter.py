"""Reads adapters back as PEFT would, to see that what was saved is what was learned."""

import json

import torch
from safetensors.torch import load_file

from codellama.model.lora import ADAPTERS, add_adapters
from codellama.recipe import Lora


def load_adapter(folder, model):
    """Put the adapters of a folder into a model; returns their settings."""
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    targets = tuple(sorted(values["target_modules"]))
    settings = Lora(rank=values["r"], alpha=values["lora_alpha"], targets=targets)
    add_adapters(model, settings)
    wanted = {n: p for n, p in model.named_parameters() if n.endswith(ADAPTERS)}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}.weight" for name in wanted}
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[f"base_model.model.{name}.weight"])
    return settings
