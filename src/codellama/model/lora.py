"""Low-rank adapters: a frozen matrix W learns as W + (alpha / r) B A, and can be merged into it.

Folder (PEFT's layout, so that PEFT loads it): adapter_config.json, adapter_model.safetensors.

Source: LoRA, arXiv 2106.09685; the names of files, keys and tensors are PEFT's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from codellama.artifact import new_folder
from codellama.model.transformer import Transformer
from codellama.recipe import Lora

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
ADAPTERS = ("lora_A", "lora_B")


class LoraLinear(nn.Module):
    """A bias-free linear layer with a frozen matrix and a trained update of low rank."""

    def __init__(self, base: nn.Linear, settings: Lora) -> None:
        super().__init__()
        self.weight = base.weight
        self.scale = settings.alpha / settings.rank
        self.lora_A = nn.Parameter(base.weight.new_zeros(settings.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, settings.rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight) + self.scale * F.linear(
            F.linear(x, self.lora_A), self.lora_B
        )


def add_adapters(model: Transformer, settings: Lora, seed: int = 0) -> None:
    """Freeze a model and put adapters beside its matrices, in place."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in settings.targets:
            model.set_submodule(name, LoraLinear(module, settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(ADAPTERS) and not parameter.is_meta:
            initialise_adapter(name, parameter, generator)


def initialise_adapter(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """PEFT's start: uniform as of an nn.Linear for A, zeros for B, so that nothing changes yet."""
    if name.endswith("lora_B"):
        return nn.init.zeros_(weight)
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def merged_state(tensors: dict[str, Tensor], settings: Lora) -> dict[str, Tensor]:
    """W + (alpha / r) B A under the names of a model without adapters.

    Args:
        tensors: the state of a model with adapters.
    """
    merged = {name: t for name, t in tensors.items() if not name.endswith(ADAPTERS)}
    for name, down in tensors.items():
        if name.endswith("lora_A"):
            weight = name.removesuffix("lora_A") + "weight"
            up = tensors[name.removesuffix("A") + "B"].float()
            update = settings.alpha / settings.rank * (up @ down.float())
            merged[weight] = (merged[weight].float() + update).to(merged[weight].dtype)
    return merged


def save_adapter(folder: str | Path, tensors: dict[str, Tensor], settings: Lora, base: str) -> None:
    """Write the adapters of a model as PEFT does.

    Args:
        tensors: the state of a model with adapters.
        base: the checkpoint that they belong to, as PEFT is told.

    Raises:
        OSError: the folder cannot be written; what stood there before is untouched.
    """
    adapters = {
        f"{_PREFIX}{name}.weight": tensor.contiguous()
        for name, tensor in tensors.items()
        if name.endswith(ADAPTERS)
    }
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(Path(folder)) as temporary:
        text = json.dumps(values, indent=2) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        try:
            save_file(adapters, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder}: cannot be written: {error}") from None
