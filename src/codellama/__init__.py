"""codellama: the whole Code Llama system, from raw source code to a served model.

The public names are resolved when they are first used, so that importing the package stays fast
and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codellama import sandbox
    from codellama.engine import Completion, Engine, SamplingParams
    from codellama.recipe import load_recipe
    from codellama.tokenizer import Tokenizer
    from codellama.weights import load

__all__ = ["Completion", "Engine", "SamplingParams", "Tokenizer", "load", "load_recipe", "sandbox"]

_MODULES = {
    "Completion": "codellama.engine",
    "Engine": "codellama.engine",
    "SamplingParams": "codellama.engine",
    "Tokenizer": "codellama.tokenizer",
    "load": "codellama.weights",
    "load_recipe": "codellama.recipe",
}


def __getattr__(name: str) -> Any:
    if name == "sandbox":
        return import_module("codellama.sandbox")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'codellama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
