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
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codellama.artifact import new_folder
from codellama.model.source import inside, read_json
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


def load_adapter(folder: str | Path, model: Transformer) -> Lora:
    """Put adapters of a folder beside the matrices of the model that they were trained on.

    Raises:
        ValueError: not an adapter folder, damaged, of a kind that is not supported, or for a model
            of another shape; names the file and the tensor.
    """
    folder = Path(folder)
    try:
        values = read_json(inside(folder, CONFIG_FILE))
        tensors = load_file(inside(folder, WEIGHTS_FILE))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: not an adapter folder: {error}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: damaged: {error}") from None
    for key, expected in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False)):
        if values.get(key, expected) != expected:
            raise ValueError(f"{folder / CONFIG_FILE}: {key} = {values[key]!r} is not supported")
    try:
        targets = sorted(values["target_modules"])  # PEFT writes a set in any order
        named = {"rank": values["r"], "alpha": values["lora_alpha"], "targets": targets}
        settings = Lora.model_validate(named)
    except ValidationError as error:
        first = error.errors()[0]
        key = {"rank": "r", "alpha": "lora_alpha"}.get(str(first["loc"][0]), "target_modules")
        raise ValueError(f"{folder / CONFIG_FILE}: {key}: {first['msg']}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    add_adapters(model, settings)
    wanted = {n: p for n, p in model.named_parameters() if n.endswith(ADAPTERS)}
    found = {k.removeprefix(_PREFIX).removesuffix(".weight"): t for k, t in tensors.items()}
    for name in sorted(wanted.keys() ^ found.keys()):
        problem = "is missing" if name in wanted else "is not part of this model"
        raise ValueError(f"{folder / WEIGHTS_FILE}: tensor {name!r} {problem}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != found[name].shape:
                raise ValueError(
                    f"{folder / WEIGHTS_FILE}: tensor {name!r} has shape "
                    f"{tuple(found[name].shape)}, expected {tuple(parameter.shape)}"
                )
            parameter.copy_(found[name])
    return settings
