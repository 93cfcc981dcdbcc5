"""Commands that make a model: prepare, train, run, and the tokenizer's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codellama import terminal
from codellama.commands.options import (
    Contexts,
    Device,
    Devices,
    DryRun,
    Grid,
    Hardware,
    Json,
    Mfu,
    Model,
    Overrides,
    RecipeFile,
    Replicas,
    TensorBoard,
    TensorParts,
    Workers,
    check_device,
    read_recipe,
)

if TYPE_CHECKING:
    from codellama.recipe import Recipe
    from codellama.tokenizer import Tokenizer


def prepare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Work on a Ray cluster; auto is the one running here."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read sources, filter, deduplicate, and write the corpus and the vocabulary.

    What was finished before an interruption is not done again.
    """
    loaded = read_recipe(recipe, overrides)
    if not dry_run:
        _prepare(loaded, ray)
        return
    from codellama.data.prepare import plan_corpus

    plan = plan_corpus(loaded)
    if as_json:
        print(json.dumps(plan))
        return
    for row in plan:
        row["unavailable"] = ", ".join(row["unavailable"])
    print(terminal.table([{name: str(value) for name, value in row.items()} for row in plan]))


def train(
    recipe: RecipeFile,
    stage: Annotated[
        str | None, typer.Option(help="Which stage; may be left out if only one.")
    ] = None,
    overrides: Overrides = None,
    device: Device = "cpu",
    workers: Workers = 1,
    replicas: Replicas = 1,
    tensor: TensorParts = 1,
    context: Contexts = 1,
    tensorboard: TensorBoard = False,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Only write a checkpoint of a train state, into this."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="With --export: not of the newest one.")] = None,
    dry_run: DryRun = False,
    hardware: Hardware = None,
    devices: Devices = 1,
    mfu: Mfu = None,
    grid: Grid = None,
    as_json: Json = False,
) -> None:
    """Run one stage, or continue it where it was interrupted."""
    loaded = read_recipe(recipe, overrides)
    if stage is None and len(loaded.stages) > 1:
        raise typer.BadParameter(f"one of {', '.join(loaded.stages)}", param_hint="--stage")
    stage = stage or next(iter(loaded.stages))
    _check_stage(loaded, stage, "--stage")
    if dry_run:
        _print_plan(loaded, [stage], hardware, devices, mfu, grid, as_json)
    elif export is not None:
        from codellama.train.export import export_state

        terminal.say(f"step {export_state(loaded, stage, export, step)}")
        print(export)
    else:
        _train(loaded, [stage], device, workers, tensorboard, replicas, tensor, context)


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this stage (may be repeated).")
    ] = None,
    begin: Annotated[
        str | None, typer.Option("--from", help="This stage and all that start from it.")
    ] = None,
    device: Device = "cpu",
    workers: Workers = 1,
    tensorboard: TensorBoard = False,
    dry_run: DryRun = False,
    hardware: Hardware = None,
    devices: Devices = 1,
    mfu: Mfu = None,
    grid: Grid = None,
    as_json: Json = False,
) -> None:
    """From raw source code to trained checkpoints: prepare, then every stage in order.

    Stages that are finished are skipped, one that was interrupted continues.
    """
    loaded = read_recipe(recipe, overrides)
    for name in [*(only or []), *([begin] if begin else [])]:
        _check_stage(loaded, name, "--only" if only and name in only else "--from")
    stages = loaded.stage_order()
    if begin is not None:
        stages = [name for name in stages if begin in loaded.ancestry(name)]
    if only:
        stages = [name for name in stages if name in only]
    if dry_run:
        _print_plan(loaded, stages, hardware, devices, mfu, grid, as_json)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("under torchrun: prepare first, then `codellama train` a stage")
    _prepare(loaded)
    if not _train(loaded, stages, device, workers, tensorboard):
        return
    from codellama.train.report import stage_table

    table = stage_table(loaded)
    print(json.dumps(table) if as_json else terminal.table(table))


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


def _prepare(recipe: Recipe, ray: str | None = None) -> None:
    from codellama.data.prepare import prepare_corpus
    from codellama.data.vocabulary import prepare_tokenizer

    print(prepare_corpus(recipe, ray))
    print(prepare_tokenizer(recipe))


def _check_stage(recipe: Recipe, name: str, option: str) -> None:
    try:
        recipe.stage(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _train(
    recipe: Recipe,
    stages: list[str],
    device: str,
    workers: int,
    tensorboard: bool,
    n_replicas: int = 1,
    n_tensor: int = 1,
    n_context: int = 1,
) -> bool:
    """Run stages one after the other; whether all of them came to their end."""
    check_device(device)
    from codellama.train import TrainingStopped, train

    try:
        for stage in stages:
            layout = n_replicas, n_tensor, n_context
            print(train(recipe, stage, device, workers, *layout, tensorboard))
            if recipe.stages[stage].measure_lines:
                _measure_lines(recipe, stage, device)
    except TrainingStopped as stopped:
        terminal.say(str(stopped))
        return False
    return True


def _measure_lines(recipe: Recipe, name: str, device: str) -> None:
    """Infill lines of held-out documents with the weights before and after a stage."""
    from codellama.artifact import write_file
    from codellama.engine.engine import Engine
    from codellama.eval.held_out_lines import draw_gaps, fill_lines

    stage, folder = recipe.stages[name], recipe.run_dir(name)
    if (folder / "infill_lines.json").exists() or stage.init == "random":
        return
    parent = (
        recipe.run_dir(stage.init) / "checkpoint" if stage.init in recipe.stages else stage.init
    )
    results: dict[str, dict[str, float]] = {}
    for when, weights in (("before", parent), ("after", folder / "checkpoint")):
        terminal.say(f"infilling {stage.measure_lines} held-out lines with the weights {when}")
        engine = Engine(str(weights), device)
        gaps = draw_gaps(recipe.corpus_dir, stage.measure_lines, engine)
        results[when] = fill_lines(engine, gaps).exact_match()
    rows = [
        {"exact match": when} | {way: f"{share:.1%}" for way, share in result.items()}
        for when, result in results.items()
    ]
    write_file(folder / "infill_lines.json", json.dumps(results) + "\n")
    print(terminal.table(rows))


def _print_plan(
    recipe: Recipe,
    stages: list[str],
    hardware: str | None,
    n_devices: int,
    mfu: float | None,
    grid: float | None,
    as_json: bool,
) -> None:
    """What stages would cost, as a table or as JSON with all details."""
    from codellama.train.plan import GRID_KG_PER_KWH, plan, plan_table

    factor = GRID_KG_PER_KWH if grid is None else grid
    try:
        plans = [plan(recipe, stage, hardware, n_devices, mfu, factor) for stage in stages]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(json.dumps(plans, indent=2) if as_json else terminal.table(plan_table(plans)))


def _tokenizer(model: str | None) -> Tokenizer:
    """The tokenizer of a model of any kind; torch is needed only where it is not a file."""
    from codellama.tokenizer import Tokenizer

    path = Path(model) if model else Path(__file__).parent.parent / "pretrained"
    names = ("tokenizer.model", "tokenizer.json")
    if path.suffix in (".model", ".json") or any((path / name).exists() for name in names):
        return Tokenizer.load(path)
    from codellama.weights import load_tokenizer, open_weights

    return load_tokenizer(open_weights(path if model is None else model))
