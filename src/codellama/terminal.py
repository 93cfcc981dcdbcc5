"""Text in and out of the commands: arguments, standard streams, colours, growing markdown.

Results are bytes as they are: text that is not UTF-8 comes in and goes out unchanged, and a pipe
gets neither colours nor redrawing. Nothing here knows a model or decides what a command does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

DIM, BRIGHT = "2", "1;32"
_LIVE_LINES = 6  # redrawn with each piece; markdown further up no longer changes
_FRAME_S = 0.05  # between two drawings; more pieces than eyes can follow would cost the model time


def prepare_streams() -> None:
    """Let text that is not UTF-8 pass, and give closed streams a place to write to."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]


def finish_output() -> None:
    """Flush standard output; what cannot be written goes nowhere.

    The interpreter flushes once more when it ends, and would report the same failure again.
    """
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def read_text(argument: str) -> str:
    """The argument itself, or for `-` all of standard input, byte for byte (CRLF stays).

    Raises:
        ValueError: standard input is closed.
    """
    if argument != "-":
        return argument
    if sys.stdin is None:
        raise ValueError("standard input is closed; give the text as an argument")
    if sys.stdin.isatty():
        say("reading standard input; end with Ctrl-D")
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")


def write(text: str) -> None:
    """Put text on standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    """Put one line on standard error, whatever it holds."""
    print("codellama: " + " ".join(line.split()), file=sys.stderr, flush=True)


def table(rows: list[dict[str, str]]) -> str:
    """Rows of named cells as aligned columns; what looks like a number stands on the right."""
    if not rows:
        return ""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    is_number = {
        name: all(row[name][:1].isdecimal() or not row[name] for row in rows) for name in names
    }
    lines = [
        "  ".join(
            row[name].rjust(widths[name]) if is_number[name] else row[name].ljust(widths[name])
            for name in names
        ).rstrip()
        for row in [dict(zip(names, names, strict=True)), *rows]
    ]
    return "\n".join(lines)


def styled(text: str, style: str) -> str:
    """The text in DIM or BRIGHT where standard output shows colours, else as it is."""
    return f"\x1b[{style}m{text}\x1b[0m" if text and has_colours() else text


def has_colours() -> bool:
    """Whether standard output is a terminal whose user wants colours. Source: no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


class PlainView:
    """An answer as text, piece by piece; ends with a newline."""

    def __init__(self) -> None:
        self._last = ""

    def add(self, piece: str) -> None:
        """Show more text."""
        if not self._last:
            piece = piece.lstrip()  # the space between the question's end and the answer
        if piece:
            self._last = piece
            write(piece)

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._last.endswith("\n"):
            write("\n")


class MarkdownView:
    """An answer as markdown that grows on a terminal, code in colours.

    The last few lines are drawn again as text arrives; those above are printed once, so that a long
    answer scrolls like any other output.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")
        self._text = ""
        self._n_printed = 0
        self._next_frame = 0.0

    def add(self, piece: str) -> None:
        """Show more text."""
        self._text += piece
        begin = time.monotonic()
        if begin >= self._next_frame:
            self._draw(_LIVE_LINES)
            end = time.monotonic()
            # A long answer takes longer to draw; never more than a fifth of the time.
            self._next_frame = end + max(_FRAME_S, 4 * (end - begin))

    def __enter__(self) -> MarkdownView:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._draw(0)
        finally:
            self._live.stop()

    def _draw(self, n_live: int) -> None:
        """Print the lines that are final now, and draw the last `n_live` in place."""
        from rich.markdown import Markdown
        from rich.segment import Segment, Segments

        lines = self._console.render_lines(Markdown(self._text.strip()), pad=False, new_lines=True)
        n_final = max(len(lines) - n_live, self._n_printed)

        def together(part: list[list[Segment]]) -> Segments:
            return Segments([segment for line in part for segment in line])

        if n_final > self._n_printed:
            self._console.print(together(lines[self._n_printed : n_final]), end="")
            self._n_printed = n_final
        live = lines[n_final:]
        if live and live[-1] and live[-1][-1].text == "\n":
            live = [*live[:-1], live[-1][:-1]]  # Live ends the last line itself
        self._live.update(together(live), refresh=True)


@contextmanager
def byte_progress(what: str, in_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes bytes (or things) done and in all, for a bar on a terminal."""
    from rich.console import Console
    from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    more = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = *Progress.get_default_columns(), *more
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
