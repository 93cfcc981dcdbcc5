"""Writes docs/cli.md from the commands themselves; a test compares the two.

Run it with `make docs`. What stands in the page is what `--help` shows, without its boxes.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer.main

from codellama.cli import app

PAGE = Path(__file__).parent / "cli.md"
HEAD = """# The command line

Written by `docs/make_cli.py`; change the help of the commands instead.

Results go to standard output, progress and messages to standard error. `--json` prints one object.
Exit codes: 0 done · 1 failed, with one line that says why · 2 the arguments are wrong ·
3 a program was not run, for want of isolation or a toolchain · 130 Ctrl-C.
"""


def page() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            parts += [_section(f"{name} {sub}", c) for sub, c in command.commands.items()]
        else:
            parts.append(_section(name, command))
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["codellama", name, *(_argument(p) for p in arguments)])
    lines = [f"## codellama {name}", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["```", f"{usage} [OPTIONS]", "```", ""]
    rows = [(f"`{_name(p)}`", p) for p in arguments]
    rows += [(f"`{_name_of_option(p)}`", p) for p in options]
    lines += ["| | | default |", "|---|---|---|"]
    lines += [f"| {shown} | {_help(p)} | {_default(p)} |" for shown, p in rows]
    return "\n".join([*lines, ""])


def _name(parameter: Any) -> str:
    return (parameter.metavar or parameter.name).upper()


def _argument(parameter: Any) -> str:
    name = _name(parameter) + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _name_of_option(parameter: Any) -> str:
    shown = "" if parameter.is_flag else " " + (parameter.metavar or parameter.name.upper())
    return (parameter.opts[0] + shown).replace("|", "\\|")


def _help(parameter: Any) -> str:
    return (parameter.help or "").replace("<", "&lt;")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    value = getattr(parameter.default, "value", parameter.default)
    is_unset = value is None or value is False or value == ""
    return "" if is_unset else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
