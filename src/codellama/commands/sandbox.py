"""Commands around running programs: sandbox and doctor."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from codellama import terminal
from codellama.commands.options import Json

EXIT_REFUSED = 3


class Isolation(StrEnum):
    """How a program is kept from the rest of the machine."""

    NAMESPACES, NONE = "namespaces", "none"


def sandbox(
    file: Annotated[str, typer.Argument(help="A program, or - for standard input.")],
    language: Annotated[
        str | None, typer.Option(help="By default what the file's ending says; else Python.")
    ] = None,
    stdin: Annotated[
        str | None, typer.Option(metavar="FILE", help="What the program reads.")
    ] = None,
    tests: Annotated[
        Path | None, typer.Option(help="Judge it by these Python tests, run in another jail.")
    ] = None,
    entry_point: Annotated[
        str | None, typer.Option(help="The function that the tests' check(candidate) is given.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Wall time.")] = 5.0,
    memory: Annotated[int, typer.Option(metavar="MB", help="For all its processes.")] = 512,
    isolation: Annotated[
        Isolation,
        typer.Option("--sandbox", metavar="|".join(Isolation), help="How it is isolated."),
    ] = Isolation.NAMESPACES,
    understood: Annotated[
        bool,
        typer.Option(
            "--i-understand",
            help="With --sandbox none: the program can read, change and send all that you can.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a program in isolation; it passes when it ends with exit status 0, or every test holds.

    Exit codes: 0 it passed, 1 it did not, 3 it was not run.
    """
    import codellama.sandbox as sandboxes

    if isolation is Isolation.NONE and not understood:
        terminal.say(
            "--sandbox none gives the program all your files and the network; it is accepted only "
            "with --i-understand, for a program that you wrote"
        )
        raise typer.Exit(EXIT_REFUSED)
    if isolation is Isolation.NONE:
        terminal.say("warning: running without isolation")
    program = _read(file)
    limits: dict[str, Any] = {"timeout_s": timeout, "memory_bytes": memory << 20}
    mode = isolation.value
    if tests:
        text = _read(str(tests))
        outcome = sandboxes.judge(program, text, entry_point=entry_point, mode=mode, **limits)
    else:
        language = language or (Path(file).suffix[1:] if file != "-" else "") or "python"
        given = _read(stdin) if stdin else ""
        outcome = sandboxes.run(program, given, language=language, mode=mode, **limits)
    if as_json:
        print(json.dumps(outcome.as_dict()))
    else:
        terminal.write(outcome.stdout)
        print(outcome.stderr, end="", file=sys.stderr)
        if not outcome.passed:
            terminal.say(f"{outcome.status}: {outcome.message}")
    if outcome.status == "refused":
        raise typer.Exit(EXIT_REFUSED)
    if not outcome.passed:
        raise typer.Exit(1)


def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: isolation for programs, languages, processors, torch."""
    facts = {**_machine(), **_isolation(), **_languages(), **_torch()}
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):<20} {shown if shown not in ('', []) else '-'}")


def _read(path: str) -> str:
    if path == "-":
        return terminal.read_text("-")
    return Path(path).read_bytes().decode("utf-8", "surrogateescape")


def _machine() -> dict[str, Any]:
    n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "memory_gb": round(n_bytes / 1e9, 1),
    }


def _isolation() -> dict[str, Any]:
    """Whether a jail starts and holds the probe's attacks, and in what time."""
    from codellama.sandbox import NoIsolationError, Pool

    begin = time.perf_counter()
    try:
        with Pool(n_workers=1):
            seconds = round(time.perf_counter() - begin, 2)
            found = "namespaces, mounts, seccomp: holds the attacks of the probe"
            return {"isolation": found, "isolated": True, "sandbox_start_s": seconds}
    except NoIsolationError as error:
        return {"isolation": f"none: {error}", "isolated": False}


def _languages() -> dict[str, Any]:
    from codellama.sandbox.languages import LANGUAGES, commands_of

    missing = {name: commands_of(language)[1] for name, language in LANGUAGES.items()}
    return {
        "languages": [name for name, program in missing.items() if not program],
        "missing_languages": [f"{n} (needs {p})" for n, p in missing.items() if p],
    }


def _torch() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpus": devices}
