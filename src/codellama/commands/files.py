"""Commands on files: convert and inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from codellama import terminal
from codellama.commands.options import Format, Json


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Any model: folder, .gguf file or hub name.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder or .gguf file to write.")
    ],
    to: Annotated[
        Format,
        typer.Option(
            metavar="|".join(Format), help="Hugging Face folder, Meta folder or GGUF file."
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; as it is by default.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="q8_0 or q4_0 (GGUF), int8 or int4 (hf).")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="Model-parallel files, for Meta.")] = 1,
    variant: Annotated[
        str | None,
        typer.Option(help="7b-instruct and so on, where nothing in SRC says what the model is."),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinite weights.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST once the new one is whole.")
    ] = False,
) -> None:
    """Write a model in another format, tensor by tensor, whole or not at all."""
    from codellama import weights

    with terminal.byte_progress("converting") as progress:
        print(
            weights.convert(
                source,
                target,
                to=to.value,
                dtype=dtype,
                quantize=quantize,
                n_shards=shards,
                variant=variant,
                allow_nonfinite=allow_nonfinite,
                overwrite=overwrite,
                progress=progress,
            )
        )


def inspect(
    path: Annotated[str, typer.Argument(help="A model in any format, a corpus, or a run.")],
    others: Annotated[
        list[str] | None, typer.Argument(help="More runs, to compare with the first.")
    ] = None,
    plot: Annotated[Path, typer.Option(help="Where to draw the losses of several runs.")] = Path(
        "runs.png"
    ),
    as_json: Json = False,
) -> None:
    """Say what a folder or file is: shape and needs of a model, counts of a corpus or a run."""
    from codellama.inspection import as_lines, inspect_path

    if not others:
        facts = inspect_path(path)
        if any(Path(path).glob("train-*.parquet")):
            from codellama.data.corpus import random_documents

            facts["random_documents"] = random_documents(Path(path))
        print(json.dumps(facts) if as_json else as_lines(facts))
        return
    from codellama.train.metrics import draw_comparison

    paths = [path, *others]
    runs = [inspect_path(each) for each in paths]
    for each, facts in zip(paths, runs, strict=True):
        if facts["kind"] != "run":
            raise ValueError(f"{each}: is a {facts['kind']}; only runs can be compared")
    draw_comparison([Path(each) for each in paths], plot)
    if as_json:
        print(json.dumps({"runs": runs, "plot": str(plot)}))
        return
    rows: list[dict[str, str]] = []
    for each, facts in zip(paths, runs, strict=True):
        row = {"run": each, "step": f"{facts['step']} of {facts['steps']}"}
        row |= {"tokens": f"{facts['tokens']:,}", "loss": f"{facts['loss']:.4f}"}
        for name in ("validation_loss", "validation_bits_per_byte"):
            value = facts["validation"].get(name)
            row[name.replace("_", " ")] = "" if value is None else f"{value:.4f}"
        rows.append(row)
    print(terminal.table(rows))
    print(plot)
