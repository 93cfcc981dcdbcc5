"""Completions of many prompts into a file of JSON lines, which a later call goes on with.

Each prompt is a row when its last text has ended, in the order in which they end. All that is left
is queued at once, so that the batch, or a cluster behind an Endpoint, stays full. What was cut by a
kill is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from codellama.engine import SamplingParams
from codellama.engine.generator import Generator
from codellama.engine.sequence import Completion
from codellama.rows import Row, appending, read_rows


def complete_into(
    path: Path,
    generator: Generator,
    prompts: Sequence[str],
    params: SamplingParams,
    progress: Callable[[int, int], object] = lambda n_done, n_wanted: None,
) -> list[Row]:
    """Complete what has no row yet; all rows, in the order of the prompts.

    A row is {"index", "prompt_sha256", "completions"}; each completion has the fields of
    `Completion`.

    Args:
        progress: called with the prompts done and those in all.

    Raises:
        ValueError: the file holds rows of other prompts or settings, or another process writes it.
    """
    named = {number: _name(prompt, params) for number, prompt in enumerate(prompts)}
    rows: dict[int, Row] = {}
    with appending(path) as append:
        for row in read_rows(path):
            number = row.get("index", -1)
            if row.get("prompt_sha256") != named.get(number):
                raise ValueError(
                    f"{path}: row {number!r} is of another prompt or other settings; "
                    "expected a new file, or the same call again"
                )
            rows[number] = row
        left = [number for number in range(len(prompts)) if number not in rows]
        progress(len(rows), len(prompts))

        def keep(place: int, found: list[Completion]) -> None:
            if any(completion.finish_reason == "cancelled" for completion in found):
                return  # not whole: it is asked for again
            number = left[place]
            texts = [asdict(completion) for completion in found]
            rows[number] = {"index": number, "prompt_sha256": named[number], "completions": texts}
            append(rows[number])
            progress(len(rows), len(prompts))

        generator.complete([prompts[number] for number in left], params, on_end=keep)
    return [rows[number] for number in sorted(rows)]


def _name(prompt: str, params: SamplingParams) -> str:
    text = json.dumps([prompt, asdict(params)])
    return hashlib.sha256(text.encode()).hexdigest()
