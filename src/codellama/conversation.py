"""A conversation with a model: the dialog so far, one answer at a time, and the interactive loop.

The dialog stays one that the tokenizer accepts: what it refuses is never added. An answer runs in a
thread of its own, so that Ctrl-C can end it between two steps of the engine and the session goes
on. How answers are drawn is in `terminal`; prompt formats are the tokenizer's.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from codellama.engine import Completion, Engine, SamplingParams
from codellama.terminal import MarkdownView, PlainView, has_colours, say, write
from codellama.tokenizer.chat import TAGS, Message

HELP = """\
/reset        forget the conversation; the system text stays
/system TEXT  set the system text; without TEXT, remove it
/help         show this
/exit         leave; so does Ctrl-D
A line that ends with \\ goes on in the next one, and so does everything between two \"\"\".
Ctrl-C ends the answer that is being written."""
BASE_MODEL = "warning: this is a base model that was not trained to chat; expect odd answers"
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


class ContextFullError(ValueError):
    """The dialog is longer than what the model can look back at."""


class Conversation:
    """The messages so far; `ask` adds a question and its answer.

    Raises:
        ValueError: the system text holds a tag of the chat format, or leaves no room in the
            context.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str = "") -> None:
        self._engine, self._params = engine, params
        self._exchanges: list[Message] = []
        self._system = ""
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        """The dialog, with the system message in front where there is one."""
        first: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        return first + self._exchanges

    def set_system(self, text: str) -> None:
        """Replace the system text from here on; an empty one removes it.

        Raises:
            ValueError: it holds a tag of the chat format, or is too long; the old one stays.
        """
        before, self._system = self._system, text.strip()
        try:
            self._check([*self.messages, {"role": "user", "content": ""}])
        except ValueError:
            self._system = before
            raise

    def reset(self) -> None:
        """Forget all questions and answers."""
        self._exchanges = []

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> Completion:
        """Answer a question; `on_text` gets the answer piece by piece. Ctrl-C ends it early.

        Raises:
            ValueError: the question holds a tag of the chat format, or the context is full; the
                conversation is as it was.
        """
        question: Message = {"role": "user", "content": text}
        dialog = [*self.messages, question]
        self._check(dialog)
        result = self._generate(dialog, on_text)
        # A model may write a tag, which no later prompt may hold: the answer is kept up to it.
        cuts = [at for tag in TAGS if (at := result.text.find(tag)) >= 0]
        answer = result.text[: min(cuts, default=None)].strip()
        if answer or result.finish_reason != "cancelled":
            self._exchanges += [question, {"role": "assistant", "content": answer}]
        return result

    def is_full(self, result: Completion) -> bool:
        """Whether an answer ended because there was no more room in the context."""
        n_tokens = result.prompt_tokens + len(result.token_ids)
        return result.finish_reason == "length" and n_tokens >= self._engine.max_context

    def _check(self, dialog: list[Message]) -> None:
        n_tokens, limit = (
            len(self._engine.tokenizer.encode_dialog(dialog)),
            self._engine.max_context,
        )
        if n_tokens >= limit:
            raise ContextFullError(
                f"no room: the conversation has {n_tokens} tokens, the model's context {limit}"
            )

    def _generate(self, dialog: list[Message], on_text: Callable[[str], None] | None) -> Completion:
        pieces: SimpleQueue[str | None] = SimpleQueue()
        is_cancelled = threading.Event()

        def take(_: int, piece: str) -> None:
            if is_cancelled.is_set():  # a signal that came before the engine had begun
                self._engine.cancel()
            pieces.put(piece)

        def cancel(*_: Any) -> None:
            is_cancelled.set()
            self._engine.cancel()

        with ThreadPoolExecutor(1) as thread, _on_interrupt(cancel):
            future = thread.submit(self._engine.chat, [dialog], self._params, take)
            future.add_done_callback(lambda _: pieces.put(None))
            while (piece := pieces.get()) is not None:
                if on_text:
                    on_text(piece)
            return future.result()[0]


def answer(conversation: Conversation, text: str) -> Completion:
    """Ask, and show the answer as it comes: markdown on a terminal, plain text in a pipe.

    Raises:
        ValueError: as `Conversation.ask`.
    """
    with make_view() as view:
        return conversation.ask(text, view.add)


def make_view() -> MarkdownView | PlainView:
    """The way answers are shown on this standard output."""
    if not has_colours():
        return PlainView()
    from rich.console import Console

    return MarkdownView(Console(file=sys.stdout))


def converse(conversation: Conversation) -> None:
    """Read questions and commands until the end of the input, answering each."""
    if sys.stdin is None:
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and recalls earlier ones
        print("Ask something; /help lists the commands, Ctrl-D leaves.", file=sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # inherited from a script's background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            text = read_message()
            if text is None or not _respond(conversation, text):
                return
        except KeyboardInterrupt:  # at the prompt: drop what was typed
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)


def _respond(conversation: Conversation, text: str) -> bool:
    """Carry out a command or answer a question; False ends the session."""
    command = _COMMAND.fullmatch(text)
    if not text.strip():
        return True
    if command is None:
        _ask(conversation, text)
        return True
    name, argument = command.group(1), command.group(2) or ""
    if name in ("exit", "quit", "bye"):
        return False
    if name == "reset":
        conversation.reset()
        print("(the conversation starts anew)", file=sys.stderr)
    elif name == "system":
        try:
            conversation.set_system(argument)
        except ValueError as error:
            say(str(error))
        else:
            print(f"(system text {'set' if argument.strip() else 'removed'})", file=sys.stderr)
    elif name == "help":
        print(HELP, file=sys.stderr)
    else:
        say(f"unknown command /{name}; there are /reset, /system, /help and /exit")
    return True


def _ask(conversation: Conversation, text: str) -> None:
    try:
        result = answer(conversation, text)
    except ContextFullError as error:
        say(f"{error}; /reset starts anew")
        return
    except ValueError as error:  # a tag of the chat format: to be written in another way
        say(str(error))
        return
    if result.finish_reason == "cancelled":
        print("(cancelled)", file=sys.stderr)
    elif conversation.is_full(result):
        print("(the model's context is full; /reset starts anew)", file=sys.stderr)
    elif result.finish_reason == "length":
        n_tokens = len(result.token_ids)
        print(f"(ended after {n_tokens} tokens; --max-tokens allows more)", file=sys.stderr)


def read_message() -> str | None:
    """One message, of several lines where it says so; None at the end of the input."""
    line = _read_line("> ")
    if line is None:
        return None
    lines: list[str] = []
    if line.lstrip().startswith('"""'):
        line = line.lstrip()[3:]
        while not line.rstrip().endswith('"""'):
            lines.append(line)
            following = _read_line(". ")
            if following is None:
                return "\n".join(lines)
            line = following
        return "\n".join([*lines, line.rstrip()[:-3]])
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = _read_line(". ") or ""
    return "\n".join([*lines, line])


def _read_line(prompt: str) -> str | None:
    """The next line without its end; prompts appear on a terminal only, never among results."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input(prompt)
        except EOFError:
            write("\n")
            return None
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


@contextmanager
def _on_interrupt(act: Callable[..., None]) -> Iterator[None]:
    """Call `act` on Ctrl-C for a while, where signals can be caught: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, act)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
