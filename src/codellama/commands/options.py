"""The options that several commands share, and what they stand for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from codellama.recipe import Recipe


class Precision(StrEnum):
    """What weights are held in; integers are for the matrices."""

    BFLOAT16, FLOAT16, FLOAT32 = "bfloat16", "float16", "float32"
    INT8, INT4 = "int8", "int4"


class Format(StrEnum):
    """What `convert` writes."""

    HF, META, GGUF = "hf", "meta", "gguf"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Hugging Face or Meta folder, .gguf file or hub name; the shipped model by default.",
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Generate at most this many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Count = Annotated[int, typer.Option("--n", help="How many alternatives.")]
Stop = Annotated[list[str] | None, typer.Option(help="End at this text (may be repeated).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SuffixFirst = Annotated[bool, typer.Option("--suffix-first", help="SPM instead of PSM.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Dtype = Annotated[
    Precision, typer.Option(metavar="|".join(Precision), help="What the weights are held in.")
]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A file such as recipes/tiny.toml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and its cost.")]
Replicas = Annotated[int, typer.Option(min=1, help="Under torchrun: copies of the sharded model.")]
TensorParts = Annotated[
    int, typer.Option("--tensor", min=1, help="Under torchrun: parts that each block is cut into.")
]
Contexts = Annotated[
    int, typer.Option("--context", min=1, help="Under torchrun: parts of each long sequence.")
]
Hardware = Annotated[
    str | None, typer.Option(help="With --dry-run: a100 or h100; this machine by default.")
]
Devices = Annotated[int, typer.Option(min=1, help="With --dry-run: how many of them.")]
Mfu = Annotated[
    float | None,
    typer.Option(
        min=0.001, max=1, help="With --dry-run: share of the matrix rate that is reached."
    ),
]
Grid = Annotated[float | None, typer.Option(min=0, help="With --dry-run: kg of CO2 for each kWh.")]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write the metrics for TensorBoard, too.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that tokenise ahead.")]


def existing_file(what: str) -> Any:
    """An option that names an existing file."""
    return typer.Option(exists=True, dir_okay=False, readable=True, help=what)


def read_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    """The recipe with its overrides; what is wrong in it is a usage error."""
    from codellama.recipe import load_recipe

    try:
        return load_recipe(path, overrides or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RECIPE") from None


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or cannot use here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without
        reason = (str(error).splitlines() or ["not available"])[0]
        raise typer.BadParameter(f"{device!r}: {reason}", param_hint="--device") from None
