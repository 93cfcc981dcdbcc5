"""Sampling: a model's answers to every problem of a task, into a samples file.

All problems are batched together. Rows are appended in a fixed order and each sample has a seed of
its own, so that a run which was killed goes on where it stopped, and ends with the same file. A
file beside it, NAME.settings.json, says how the samples were made; going on with other settings is
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codellama.artifact import code_version, write_file
from codellama.engine.sampling import SamplingParams
from codellama.engine.sequence import Completion
from codellama.eval.task import Generator, Problem, Prompt, Task, stable_seed
from codellama.rows import appending, read_rows

CHUNK = 16384  # requests in one call: the batch runs empty at its end only
TOO_LONG = "prompt_too_long"


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    Raises:
        ValueError: several samples at temperature 0, which would all be the same.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n = {self.n}: expected at least 1")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n = {self.n} at temperature 0 gives equal samples; set a temperature"
            )

    @classmethod
    def of(cls, task: Task, n: int, temperature: float | None = None, seed: int = 0) -> Decoding:
        """The task's own setting for so many samples: one is greedy."""
        if temperature is None:
            temperature = 0.0 if n == 1 else task.temperature
        return cls(n, temperature, 1.0 if temperature == 0 else task.top_p, seed)


def sample(
    generator: Generator,
    task: Task,
    path: Path,
    decoding: Decoding,
    model: dict[str, Any],
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the missing samples of a task to `path` and return the settings.

    Args:
        model: what identifies the model, for the settings.
        limit: ask only the first problems; the result is then no score of the benchmark.
        progress: called with samples done and wanted.

    Raises:
        ValueError: the file was made with other settings, or a prompt cannot be made.
    """
    problems = task.problems()[:limit]
    settings = {
        "task": task.name,
        "protocol": task.protocol,
        "data_sha256": task.files,
        "model": model,
        **asdict(decoding),
        "limit": limit,
        "code_version": code_version(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_settings(path.with_suffix(".settings.json"), settings)
    total = len(problems) * decoding.n
    with appending(path) as append:
        done = {(row["task_id"], row["sample"]) for row in read_rows(path)}
        wanted = [(p, i) for p in problems for i in range(decoding.n) if (p.task_id, i) not in done]

        def keep(row: dict[str, Any]) -> None:
            append(row)
            done.add((row["task_id"], row["sample"]))
            if progress:
                progress(len(done), total)

        for begin in range(0, len(wanted), CHUNK):
            _answer(generator, task, wanted[begin : begin + CHUNK], decoding, keep)
    return settings


def fingerprint(model: Path) -> str:
    """SHA-256 over the names, sizes, first and last megabytes of a model's files but its card."""
    digest = hashlib.sha256()
    files = sorted(model.rglob("*")) if model.is_dir() else [model]
    for file in (file for file in files if file.is_file() and file.suffix != ".md"):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(max(0, size - (1 << 20)))
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()


def _answer(
    generator: Generator,
    task: Task,
    chunk: Sequence[tuple[Problem, int]],
    decoding: Decoding,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Keep one row for each (problem, sample number), in order, as soon as it can be."""
    rows: list[dict[str, Any]] = []
    asked: list[tuple[dict[str, Any], Problem, Prompt]] = []
    params: list[SamplingParams] = []
    for problem, number in chunk:
        rows.append({"task_id": problem.task_id, "completion": "", "sample": number})
        prompt = _fitted(generator, task.prompt(problem))
        if prompt is None:
            rows[-1]["finish_reason"] = TOO_LONG
            continue
        asked.append((rows[-1], problem, prompt))
        seed = stable_seed(decoding.seed, task.name, problem.task_id, number)
        drawn = decoding.temperature, decoding.top_p
        params.append(SamplingParams(prompt.max_tokens, *drawn, seed=seed, stop=prompt.stop))
    n_kept = 0

    def note(number: int, text: str, reason: str | None) -> None:
        nonlocal n_kept
        asked[number][0].update(completion=text, finish_reason=reason)
        while n_kept < len(rows) and "finish_reason" in rows[n_kept]:
            keep(rows[n_kept])
            n_kept += 1

    def end(number: int, results: list[Completion]) -> None:
        [result] = results
        note(number, task.trim(asked[number][1], result.text), result.finish_reason)

    prompts = [each[2] for each in asked]
    kind = prompts[0].kind if prompts else "none"
    if kind == "score":
        for number, prompt in enumerate(prompts):
            scores = [[round(x, 6) for x in line] for line in generator.score(prompt.texts)]
            note(number, json.dumps(scores), "scored")
    elif kind == "infill":
        gaps = [prompt.gap for prompt in prompts if prompt.gap]
        generator.infill(gaps, params, prompts[0].suffix_first, on_end=end)
    elif kind == "chat":
        generator.chat([prompt.messages for prompt in prompts], params, on_end=end)
    elif prompts:
        generator.complete([prompt.text for prompt in prompts], params, on_end=end)
    for row in rows[n_kept:]:  # too long, all of them
        keep(row)


def _fitted(generator: Generator, prompt: Prompt) -> Prompt | None:
    """The prompt cut to the model's context where it may be; None where it does not fit.

    An endpoint that tells neither its tokenizer nor its context gets every prompt whole.
    """
    tokenizer: Any = getattr(generator, "tokenizer", None)
    context = getattr(generator, "max_context", None)
    if tokenizer is None or context is None:
        return prompt
    if prompt.kind == "score":
        texts = [tokenizer.encode(text, bos=True) for text in prompt.texts]
        if prompt.may_lose_end:
            return Prompt(texts=tuple(ids[:context] for ids in texts))
        return prompt if max(map(len, texts)) <= context else None
    if prompt.gap is not None:
        n_tokens = len(tokenizer.encode_infilling(*prompt.gap, prompt.suffix_first))
    elif prompt.messages:
        n_tokens = len(tokenizer.encode_dialog(prompt.messages))
    else:
        ids = tokenizer.encode(prompt.text, bos=True)
        n_tokens = len(ids)
        if prompt.may_lose_start and n_tokens > context - prompt.max_tokens:
            kept = max(1, context - prompt.max_tokens - 1)
            return Prompt([ids[0], *ids[-kept:]], stop=prompt.stop, max_tokens=prompt.max_tokens)
    return prompt if n_tokens < context else None


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare them with those of the file that is continued."""
    if not path.exists():
        write_file(path, json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    for key in now.keys() | before.keys():
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{path}: made with {key} = {before.get(key)!r}, now {now.get(key)!r}; "
                "continue with the same settings or write elsewhere with --out"
            )
