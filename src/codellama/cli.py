"""The command line: parse, call one function, print. Nothing is decided here.

Results go to standard output, progress and messages to standard error. A usage error ends with exit
code 2, a failed run with exit code 1 and one line that says what to do. torch is imported only
inside the commands that need it, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from codellama.engine import Completion, Engine, SamplingParams

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Code Llama: prepare data, train, complete, infill and chat.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a vocabulary; text to ids and back.")
app.add_typer(tokenizer_app, name="tokenizer")

Model = Annotated[
    str | None, typer.Option("--model", help="Checkpoint folder; the shipped model by default.")
]
MaxTokens = Annotated[int, typer.Option(help="Generate at most this many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Count = Annotated[int, typer.Option("--n", help="How many alternatives.")]
Stop = Annotated[list[str] | None, typer.Option(help="End at this text (may be repeated).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A file such as recipes/tiny.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and its cost.")]


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")] = "-",
    model: Model = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    n: Count = 1,
    stop: Stop = None,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
) -> None:
    """Continue a text. A terminal shows prompt and text; a pipe gets the new text alone."""
    text = _read_text(prompt)
    engine, params = _engine(model, device, dtype), _params(locals())
    begin = time.perf_counter()
    if as_json:
        results = engine.complete([text], params)
        _print_json({"prompt": text}, results, time.perf_counter() - begin)
    elif n > 1:
        for number, result in enumerate(engine.complete([text], params), start=1):
            _write(f"--- {number} ---\n{result.text}\n")
    else:
        if sys.stdout.isatty():
            _write(_dim(text))
        for piece in engine.stream(text, params):
            _write(piece)
        _write("\n")


@app.command()
def infill(
    text: Annotated[
        str | None, typer.Argument(help="A text with <FILL_ME> in it; - reads standard input.")
    ] = None,
    prefix_file: Annotated[Path | None, typer.Option(help="What stands before the gap.")] = None,
    suffix_file: Annotated[Path | None, typer.Option(help="What stands behind the gap.")] = None,
    suffix_first: Annotated[bool, typer.Option(help="SPM instead of PSM.")] = False,
    model: Model = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    n: Count = 1,
    stop: Stop = None,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
) -> None:
    """Fill a gap. Prints the whole text; a terminal shows what is new in colour."""
    prefix, suffix = _read_gap(text, prefix_file, suffix_file)
    engine, params = _engine(model, device, dtype), _params(locals())
    begin = time.perf_counter()
    if as_json:
        results = engine.infill([(prefix, suffix)], params, suffix_first)
        given = {"prefix": prefix, "suffix": suffix, "suffix_first": suffix_first}
        _print_json(given, results, time.perf_counter() - begin)
    elif n > 1:
        results = engine.infill([(prefix, suffix)], params, suffix_first)
        for number, result in enumerate(results, start=1):
            _write(f"--- {number} ---\n{prefix}{_bright(result.text)}{suffix}\n")
    else:
        pieces = engine.stream_infill(prefix, suffix, params, suffix_first)
        first = next(pieces, "")  # an unusable model or prompt fails before anything is printed
        _write(prefix + _bright(first))
        for piece in pieces:
            _write(_bright(piece))
        _write(suffix if suffix.endswith("\n") else suffix + "\n")


@app.command()
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Read sources, filter, deduplicate, and write the corpus and the vocabulary."""
    from codellama.data.prepare import prepare_corpus
    from codellama.data.vocabulary import prepare_tokenizer
    from codellama.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print(prepare_corpus(loaded))
    print(prepare_tokenizer(loaded))


@app.command()
def train(
    recipe: RecipeFile,
    stage: Annotated[str | None, typer.Option(help="Which stage; may be left out if only one.")] = None,
    overrides: Overrides = None,
    device: Device = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that tokenise ahead.")] = 1,
    dry_run: DryRun = False,
) -> None:
    """Run one stage, or continue it where it was interrupted."""
    from codellama.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if stage is None and len(loaded.stages) > 1:
        raise typer.BadParameter(f"one of {', '.join(loaded.stages)}", param_hint="--stage")
    _train(loaded, [stage or next(iter(loaded.stages))], device, workers, dry_run)


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that tokenise ahead.")] = 1,
    dry_run: DryRun = False,
) -> None:
    """From raw source code to trained checkpoints: prepare, then every stage in order."""
    from codellama.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if not dry_run:
        prepare(recipe, overrides)
    _train(loaded, loaded.stage_order(), device, workers, dry_run)


@app.command()
def demo(model: Model = None) -> None:
    """Complete a function, fill a gap, and say how fast."""
    from codellama.demo import show

    show(_engine(model, "cpu", "bfloat16"))


@tokenizer_app.command("train")
def tokenizer_train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Learn the vocabulary of a recipe from its corpus."""
    from codellama.data.vocabulary import prepare_tokenizer
    from codellama.recipe import load_recipe

    print(prepare_tokenizer(load_recipe(recipe, overrides or [])))


@tokenizer_app.command("encode")
def tokenizer_encode(
    text: Annotated[str, typer.Argument(help="- reads standard input.")] = "-",
    model: Model = None,
    bos: Annotated[bool, typer.Option(help="Put BOS in front.")] = False,
    as_json: Json = False,
) -> None:
    """Print the ids of a text."""
    ids = _tokenizer(model).encode(_read_text(text), bos=bos)
    print(json.dumps({"ids": ids}) if as_json else " ".join(map(str, ids)))


@tokenizer_app.command("decode")
def tokenizer_decode(ids: Annotated[list[int], typer.Argument()], model: Model = None) -> None:
    """Print the text of ids."""
    print(_tokenizer(model).decode(ids))


def main() -> None:
    """The entry point: errors become one line and an exit code, never a traceback."""
    # Text that is not UTF-8 comes in, and goes out again, as it is.
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    try:
        app()
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"codellama: {message}", file=sys.stderr)
        sys.exit(1)


def _train(recipe: Any, stages: list[str], device: str, workers: int, dry_run: bool) -> None:
    """Run stages one after the other, or print what they would cost."""
    if dry_run:
        from codellama.train.plan import plan

        print(json.dumps([plan(recipe, stage) for stage in stages], indent=2))
        return
    from codellama.train import TrainingStopped, train

    try:
        for stage in stages:
            print(train(recipe, stage, device, workers))
    except TrainingStopped as stopped:
        print(f"codellama: {stopped}", file=sys.stderr)


def _engine(model: str | None, device: str, dtype: str) -> Engine:
    from codellama.engine import Engine

    return Engine(model, device=device, dtype=dtype)


def _tokenizer(model: str | None) -> Any:
    from codellama.tokenizer import Tokenizer

    return Tokenizer.load(model or Path(__file__).parent / "pretrained")


def _params(options: dict[str, Any]) -> SamplingParams:
    """The sampling parameters among a command's options."""
    from codellama.engine import SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "n")
    stop = tuple(options["stop"] or ())
    try:
        return SamplingParams(
            **{name: options[name] for name in names}, stop=stop, logprobs=options["as_json"]
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read_text(argument: str) -> str:
    """The argument itself, or standard input for `-`."""
    if argument != "-":
        return argument
    if sys.stdin.isatty():
        print("reading standard input; end with Ctrl-D", file=sys.stderr)
    return sys.stdin.read()


def _read_gap(text: str | None, prefix_file: Path | None, suffix_file: Path | None) -> tuple[str, str]:
    """Prefix and suffix from a text with the fill mark, or from two files."""
    from codellama.tokenizer import split_fill

    if prefix_file is None and suffix_file is None:
        try:
            return split_fill(_read_text(text or "-"))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if text is not None:
        raise typer.BadParameter("give either a text or files, not both")
    parts = [path.read_bytes() if path else b"" for path in (prefix_file, suffix_file)]
    prefix, suffix = (part.decode("utf-8", "surrogateescape") for part in parts)
    return prefix, suffix


def _print_json(given: dict[str, Any], results: list[Completion], duration_s: float) -> None:
    """Print what was asked and every result as one object."""
    n_tokens = sum(len(result.token_ids) for result in results)
    completions = [
        {
            "text": result.text,
            "token_ids": result.token_ids,
            "logprobs": result.logprobs,
            "finish_reason": result.finish_reason,
        }
        for result in results
    ]
    usage = {"prompt_tokens": results[0].prompt_tokens, "completion_tokens": n_tokens}
    speed = {"duration_s": round(duration_s, 4), "tokens_per_s": round(n_tokens / duration_s, 1)}
    print(json.dumps(given | {"completions": completions, "usage": usage} | speed))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text


def _bright(text: str) -> str:
    return f"\x1b[1;32m{text}\x1b[0m" if text and sys.stdout.isatty() else text
