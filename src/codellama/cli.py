"""The command line: which commands there are, and how they end.

Each command parses, calls one function and prints; nothing is decided there. Results go to standard
output, progress and messages to standard error. A usage error ends with exit code 2, a failed run
with exit code 1, a refusal to run programs without isolation with 3, each with one line that says
what to do. torch is imported only inside the commands that need it, so that `--help` answers at
once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from codellama import terminal
from codellama.artifact import code_version
from codellama.commands import bench, build, evaluate, files, generate, sandbox, selfinstruct, serve

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Code Llama: prepare data, train, complete, infill and chat.",
)
for command in (
    generate.complete,
    generate.infill,
    generate.chat,
    generate.demo,
    serve.serve,
    build.prepare,
    build.train,
    build.run,
    selfinstruct.selfinstruct,
    files.convert,
    files.inspect,
    sandbox.sandbox,
    sandbox.doctor,
):
    app.command()(command)

# What follows the name belongs to the script, --help too.
app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)(bench.bench)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.score)
app.command()(evaluate.compare)

tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a vocabulary; text to ids and back.")
tokenizer_app.command("train")(build.tokenizer_train)
tokenizer_app.command("encode")(build.tokenizer_encode)
tokenizer_app.command("decode")(build.tokenizer_decode)
app.add_typer(tokenizer_app, name="tokenizer")

# ClickException; of its kind typer exports only this one, and where it lies differs by version.
_BadUsage: Any = typer.BadParameter.__mro__[2]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(code_version())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point: errors become one line and an exit code, never a traceback."""
    terminal.prepare_streams()
    code = run_command(sys.argv[1:])
    terminal.finish_output()
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        with typer.main.get_command(app).make_context("codellama", arguments) as context:
            context.command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except _BadUsage as error:
        return _explain_usage(error)
    except BrokenPipeError:  # the reader of our output has what it wanted
        return 0
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # behind the ^C
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        terminal.say(_describe(error))
        return 1


def _explain_usage(error: Any) -> int:
    """One line for what was wrong with the arguments; all help where there were none."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
    else:
        command = context.command_path if context else "codellama"
        terminal.say(f"{error.format_message().rstrip('.')} (see {command} --help)")
    return error.exit_code


def _describe(error: Exception) -> str:
    """What an error says in one line; torch adds a stack of C++ frames behind the first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0] if isinstance(error, RuntimeError) else text
