"""The command that makes instruction data, and measures what they taught."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from codellama import terminal
from codellama.commands.options import (
    Device,
    Json,
    Overrides,
    RecipeFile,
    check_device,
    read_recipe,
)
from codellama.commands.sandbox import EXIT_REFUSED


def selfinstruct(
    recipe: RecipeFile,
    overrides: Overrides = None,
    step: Annotated[
        list[str] | None,
        typer.Option(help="Only this step (may be repeated); a wrong one lists all."),
    ] = None,
    measure: Annotated[
        Path | None,
        typer.Option(exists=True, help="Measure a checkpoint on the held-out problems instead."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="With --measure: ask as chat; as the model is."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="With --measure: samples a problem.")] = 20,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Execute programs on a Ray cluster.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make instruction data: questions, tests, solutions, kept where the tests hold.

    What was done before an interruption is not done again. At the end a table says what stayed.
    """
    loaded = read_recipe(recipe, overrides)
    check_device(device)
    from codellama.sandbox import NoIsolationError
    from codellama.selfinstruct.asking import open_role
    from codellama.selfinstruct.report import markdown, report
    from codellama.selfinstruct.steps import STEPS, Run, run_steps

    if wrong := set(step or ()) - set(STEPS):
        raise typer.BadParameter(f"{min(wrong)!r}: one of {', '.join(STEPS)}", param_hint="--step")
    run = Run(loaded, partial(open_role, device=device), ray, terminal.say)
    try:
        if measure:
            _measure(run, measure, device, chat, n, as_json)
            return
        run_steps(run, step or ())
        result = report(run)
    except NoIsolationError as error:
        terminal.say(str(error))
        raise typer.Exit(EXIT_REFUSED) from None
    print(json.dumps(result) if as_json else markdown(result), end="\n" if as_json else "")


def _measure(
    run: Any, checkpoint: Path, device: str, chat: bool | None, n: int, as_json: bool
) -> None:
    from codellama.engine.engine import Engine
    from codellama.eval.report import markdown, table_rows
    from codellama.selfinstruct.measure import measure

    engine = Engine(checkpoint, device)
    is_chat = engine.tokenizer.chat_format is not None if chat is None else chat
    results = measure(run, checkpoint, engine, is_chat, n)
    if as_json:
        brief = [{k: v for k, v in result.items() if k != "problems"} for result in results]
        print(json.dumps({"results": brief}))
    else:
        print(markdown(table_rows(results)), end="")
