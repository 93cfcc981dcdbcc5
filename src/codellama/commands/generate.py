"""Commands that run a model: complete, infill, chat, demo."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codellama import terminal
from codellama.commands.options import (
    Count,
    Device,
    Dtype,
    Json,
    MaxTokens,
    Model,
    Precision,
    Seed,
    Stop,
    SuffixFirst,
    Temperature,
    TopK,
    TopP,
    check_device,
    existing_file,
)
from codellama.terminal import BRIGHT, DIM, styled, write

if TYPE_CHECKING:
    from codellama.engine import Completion, Engine, SamplingParams


def complete(
    prompt: Annotated[
        str, typer.Argument(help="The text to continue; - reads standard input.")
    ] = "-",
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
    dtype: Dtype = Precision.BFLOAT16,
    prompts: Annotated[
        Path | None, existing_file('Instead of a prompt, JSON lines of {"prompt": text}.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The JSON lines to write; goes on with what is there.")
    ] = None,
) -> None:
    """Continue a text. A terminal shows prompt and text; a pipe gets the new text alone."""
    if (prompts is None) != (out is None):
        raise typer.BadParameter("--prompts and --out belong together")
    text = "" if prompts else terminal.read_text(prompt)
    params = _params(max_tokens, temperature, top_p, top_k, seed, n, stop, as_json)
    if prompts is not None and out is not None:
        from codellama.bulk import complete_into
        from codellama.engine.endpoint import Endpoint
        from codellama.rows import read_rows

        if (model or "").startswith("http"):
            engine = Endpoint((model or "").split(","))
        else:
            engine = _engine(model, device, dtype)
        rows = read_rows(prompts)
        wanted = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
        if len(wanted) < len(rows):
            raise ValueError(f'{prompts}: expected lines of {{"prompt": "..."}}')
        with terminal.byte_progress("prompts", in_bytes=False) as progress:
            complete_into(out, engine, wanted, params, progress)
        return
    engine = _engine(model, device, dtype)
    begin = time.perf_counter()
    if as_json:
        _print_json({"prompt": text}, engine.complete([text], params), begin)
    elif n > 1:
        _print_numbered([result.text for result in engine.complete([text], params)])
    else:
        pieces = engine.stream(text, params)
        piece = next(pieces, "")  # an unusable prompt fails before anything is printed
        if sys.stdout.isatty():
            write(styled(text, DIM))
        write(piece)
        for piece in pieces:
            write(piece)
        write("" if piece.endswith("\n") else "\n")


def infill(
    text: Annotated[
        str | None, typer.Argument(help="A text with <FILL_ME> in it; - reads standard input.")
    ] = None,
    prefix_file: Annotated[Path | None, existing_file("What stands before the gap.")] = None,
    suffix_file: Annotated[Path | None, existing_file("What stands behind the gap.")] = None,
    suffix_first: SuffixFirst = False,
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
    dtype: Dtype = Precision.BFLOAT16,
) -> None:
    """Fill a gap. Prints the whole text; a terminal shows what is new in colour."""
    prefix, suffix = _read_gap(text, prefix_file, suffix_file)
    params = _params(max_tokens, temperature, top_p, top_k, seed, n, stop, as_json)
    engine = _engine(model, device, dtype)
    begin = time.perf_counter()
    if as_json:
        given = {"prefix": prefix, "suffix": suffix, "suffix_first": suffix_first}
        _print_json(given, engine.infill([(prefix, suffix)], params, suffix_first), begin)
    elif n > 1:
        results = engine.infill([(prefix, suffix)], params, suffix_first)
        _print_numbered([prefix + styled(result.text, BRIGHT) + suffix for result in results])
    else:
        pieces = engine.stream_infill(prefix, suffix, params, suffix_first)
        piece = next(pieces, "")  # an unusable model or prompt fails before anything is printed
        write(prefix + styled(piece, BRIGHT))
        for piece in pieces:
            write(styled(piece, BRIGHT))
        write(suffix if suffix.endswith("\n") else suffix + "\n")


def chat(
    message: Annotated[
        str | None,
        typer.Argument(help="One question; - reads standard input. Without it, a conversation."),
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told before all else.")] = "",
    model: Model = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Dtype = Precision.BFLOAT16,
) -> None:
    """Ask one question, or have a conversation. /help in it lists its commands."""
    if as_json and message is None:
        raise typer.BadParameter("--json needs a MESSAGE, or - to read one")
    question = "" if message is None else terminal.read_text(message)
    if message is not None and not question.strip():
        raise typer.BadParameter("the message is empty")
    params = _params(max_tokens, temperature, top_p, top_k, seed, 1, stop, as_json)
    engine = _engine(model, device, dtype)
    from codellama.conversation import BASE_MODEL, Conversation, answer, converse

    if engine.tokenizer.chat_format is None:
        terminal.say(BASE_MODEL)
    conversation = Conversation(engine, params, system)
    if message is None:
        converse(conversation)
        return
    begin = time.perf_counter()
    result = conversation.ask(question) if as_json else answer(conversation, question)
    if result.finish_reason == "cancelled":
        raise KeyboardInterrupt
    if as_json:
        _print_json({"messages": conversation.messages[:-1]}, [result], begin)


def demo(model: Model = None) -> None:
    """Complete a function, fill a gap, and say how fast."""
    engine = _engine(model, "cpu", Precision.BFLOAT16)
    from codellama.demo import show

    show(engine)


def _engine(model: str | None, device: str, dtype: Precision) -> Engine:
    check_device(device)
    from codellama.engine import Engine

    return Engine(model, device=device, dtype=dtype.value)


def _params(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    n: int,
    stop: list[str] | None,
    logprobs: bool,
) -> SamplingParams:
    from codellama.engine import SamplingParams

    try:
        return SamplingParams(
            max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()), n, logprobs
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read_gap(
    text: str | None, prefix_file: Path | None, suffix_file: Path | None
) -> tuple[str, str]:
    """Prefix and suffix from a text with the fill mark, or from two files."""
    from codellama.tokenizer import split_fill

    if prefix_file is None and suffix_file is None:
        try:
            return split_fill(terminal.read_text(text or "-"))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if text is not None:
        raise typer.BadParameter("give either a text or files, not both")
    parts = [path.read_bytes() if path else b"" for path in (prefix_file, suffix_file)]
    prefix, suffix = (part.decode("utf-8", "surrogateescape") for part in parts)
    return prefix, suffix


def _print_json(given: dict[str, Any], results: list[Completion], begin: float) -> None:
    """Print what was asked and every result as one object."""
    duration_s = time.perf_counter() - begin
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


def _print_numbered(texts: list[str]) -> None:
    for number, text in enumerate(texts, start=1):
        write(f"--- {number} ---\n{text}\n")
