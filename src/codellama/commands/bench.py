"""The command that runs a measurement of the repository's folder `bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

FOLDER = Path(__file__).resolve().parents[3] / "bench"


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without it, all are listed.")] = None,
) -> None:
    """Measure speed or quality beside other implementations; further options go to the script.

    The last line of output is one JSON object.
    """
    scripts = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
    if not scripts:
        raise ValueError(f"{FOLDER}: no measurements; they come with a clone of the repository")
    if name is None:
        for each, path in scripts.items():
            about = path.read_text(encoding="utf-8").splitlines()[0].strip('" ')
            print(f"{each:20} {about}")
        return
    if name not in scripts:
        raise typer.BadParameter(f"{name!r}: expected one of {', '.join(scripts)}")
    done = subprocess.run([sys.executable, str(scripts[name]), *context.args], check=False)
    raise typer.Exit(done.returncode)
