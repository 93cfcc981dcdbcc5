"""Commands that make a model: prepare, train, run, and the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama import terminal
from codellama.commands.options import (
    Device,
    DryRun,
    Json,
    Model,
    Overrides,
    RecipeFile,
    Workers,
    check_device,
    read_recipe,
)

if TYPE_CHECKING:
    from codellama.recipe import Recipe
    from codellama.tokenizer import Tokenizer


def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Read sources, filter, deduplicate, and write the corpus and the vocabulary."""
    _prepare(read_recipe(recipe, overrides))


def train(
    recipe: RecipeFile,
    stage: Annotated[
        str | None, typer.Option(help="Which stage; may be left out if only one.")
    ] = None,
    overrides: Overrides = None,
    device: Device = "cpu",
    workers: Workers = 1,
    dry_run: DryRun = False,
) -> None:
    """Run one stage, or continue it where it was interrupted."""
    loaded = read_recipe(recipe, overrides)
    if stage is None and len(loaded.stages) > 1:
        raise typer.BadParameter(f"one of {', '.join(loaded.stages)}", param_hint="--stage")
    stage = stage or next(iter(loaded.stages))
    try:
        loaded.stage(stage)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--stage") from None
    _train(loaded, [stage], device, workers, dry_run)


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "cpu",
    workers: Workers = 1,
    dry_run: DryRun = False,
) -> None:
    """From raw source code to trained checkpoints: prepare, then every stage in order."""
    loaded = read_recipe(recipe, overrides)
    stages = loaded.stage_order()
    if not dry_run:
        _prepare(loaded)
    _train(loaded, stages, device, workers, dry_run)


def tokenizer_train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Learn the vocabulary of a recipe from its corpus."""
    loaded = read_recipe(recipe, overrides)
    from codellama.data.vocabulary import prepare_tokenizer

    print(prepare_tokenizer(loaded))


def tokenizer_encode(
    text: Annotated[str, typer.Argument(help="- reads standard input.")] = "-",
    model: Model = None,
    bos: Annotated[bool, typer.Option("--bos", help="Put BOS in front.")] = False,
    as_json: Json = False,
) -> None:
    """Print the ids of a text."""
    ids = _tokenizer(model).encode(terminal.read_text(text), bos=bos)
    print(json.dumps({"ids": ids}) if as_json else " ".join(map(str, ids)))


def tokenizer_decode(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Whole numbers; without any, standard input.")
    ] = None,
    model: Model = None,
) -> None:
    """Print the text of ids."""
    words = ids or terminal.read_text("-").split()
    if wrong := [word for word in words if not word.isdecimal()]:
        raise typer.BadParameter(f"{wrong[0]!r} is not an id: expected whole numbers")
    text = _tokenizer(model).decode_bytes(map(int, words))
    terminal.write(text.decode("utf-8", "surrogateescape") + "\n")


def _prepare(recipe: Recipe) -> None:
    from codellama.data.prepare import prepare_corpus
    from codellama.data.vocabulary import prepare_tokenizer

    print(prepare_corpus(recipe))
    print(prepare_tokenizer(recipe))


def _train(recipe: Recipe, stages: list[str], device: str, workers: int, dry_run: bool) -> None:
    """Run stages one after the other, or print what they would cost."""
    if dry_run:
        from codellama.train.plan import plan

        print(json.dumps([plan(recipe, stage) for stage in stages], indent=2))
        return
    check_device(device)
    from codellama.train import TrainingStopped, train

    try:
        for stage in stages:
            print(train(recipe, stage, device, workers))
    except TrainingStopped as stopped:
        terminal.say(str(stopped))


def _tokenizer(model: str | None) -> Tokenizer:
    """The tokenizer of a model of any kind; torch is needed only where it is not a file."""
    from codellama.tokenizer import Tokenizer

    path = Path(model) if model else Path(__file__).parent.parent / "pretrained"
    names = ("tokenizer.model", "tokenizer.json")
    if path.suffix in (".model", ".json") or any((path / name).exists() for name in names):
        return Tokenizer.load(path)
    from codellama.weights import load_tokenizer, open_weights

    return load_tokenizer(open_weights(path if model is None else model))
