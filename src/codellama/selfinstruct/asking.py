"""Asking a model: a role of the recipe as a generator, and its samples, kept and continued.

Sampling is the evaluation's: all prompts in one batch, a seed for each sample, rows appended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from codellama.eval.sampling import Decoding, sample
from codellama.eval.task import Problem, Prompt, Task
from codellama.recipe_selfinstruct import QuestionWriter, Role
from codellama.rows import read_rows
from codellama.tokenizer.chat import Message

Open = Callable[[Role], Any]
"""Gives the generator of a role."""


class Asking(Task):
    """Prompts, each with an id, for one role."""

    def __init__(self, role: Role, prompts: Sequence[tuple[str, Prompt]]) -> None:
        super().__init__()
        self.name, self.protocol = type(role).__name__, role.prompt
        self._prompts = dict(prompts)

    def load(self) -> list[Problem]:
        """One problem a prompt."""
        return [Problem(task_id, {}) for task_id in self._prompts]

    def prompt(self, problem: Problem) -> Prompt:
        """The prompt of an id."""
        return self._prompts[problem.task_id]


def ask(
    role: Role,
    prompts: Sequence[tuple[str, Prompt]],
    path: Path,
    open_generator: Open,
    say: Callable[[str], None],
) -> None:
    """Write the samples of prompts, each with an id, that a file does not hold.

    Raises:
        ValueError: the file was made with other settings.
    """
    n = 1 if isinstance(role, QuestionWriter) else role.n
    done = {(row["task_id"], row["sample"]) for row in read_rows(path)}
    if {(task_id, i) for task_id, _ in prompts for i in range(n)} <= done:
        return
    decoding = Decoding(n, role.temperature, role.top_p, role.seed)
    model = {"model": role.model, "name": role.name, "style": role.style}

    def tell(n_done: int, n_wanted: int) -> None:
        if n_done % 1024 == 0 or n_done == n_wanted:
            say(f"{path.stem}: {n_done} of {n_wanted} samples")

    sample(open_generator(role), Asking(role, prompts), path, decoding, model, None, tell)


def turns(*texts: str) -> tuple[Message, ...]:
    """A dialog: user and assistant in turn."""
    roles = cycle(("user", "assistant"))
    return tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))


def as_prompt(role: Role, *texts: str) -> Prompt:
    """Turns of a dialog, or one text for a model that only continues it."""
    if role.style != "code":
        return Prompt(messages=turns(*texts), max_tokens=role.max_tokens)
    return Prompt("\n\n".join(texts) + "\n\n", max_tokens=role.max_tokens)


def open_role(role: Role, device: str = "cpu") -> Any:
    """The generator of a role: a model in this process, or one behind addresses.

    Raises:
        ValueError: addresses and paths are mixed, or the model cannot be read.
    """
    models = (role.model,) if isinstance(role.model, str) else role.model
    remote = [model.startswith(("http://", "https://")) for model in models]
    if all(remote):
        from codellama.engine.endpoint import Endpoint

        return Endpoint(models, model=role.name)
    if len(models) > 1:
        raise ValueError(
            f"model = {list(models)}: several must all be http:// or https:// addresses"
        )
    from codellama.engine.engine import Engine

    return Engine(next(iter(models)), device)
