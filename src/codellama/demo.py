"""What `make demo` shows: a function completed, a gap filled, the speed, and what to try next."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.text import Text

from codellama.engine import Engine, SamplingParams

COMPLETION = "class Person:\n    def __init__(self, name, age):\n"
GAP = (
    'def add(a, b):\n    """Return the sum of a and b."""\n',
    '\n\n\ndef sub(a, b):\n    """Return the difference of a and b."""\n    return a - b\n',
)
NEXT = """Try next:
  .venv/bin/codellama complete 'def fibonacci(n):'
  .venv/bin/codellama infill $'def __init__(self, name):\\n    self.name = <FILL_ME>'
  .venv/bin/codellama complete 'import os' --temperature 0.8 --n 3 --seed 1 --json
  .venv/bin/codellama chat
  .venv/bin/codellama serve                       # a page to try, and an API for your editor
  .venv/bin/codellama run recipes/tiny.toml       # train this model yourself
  make test"""


def show(engine: Engine) -> None:
    """Print the demonstration on standard output."""
    console = Console(file=sys.stdout, highlight=False)
    params = SamplingParams(max_tokens=48, stop=("\n\n",))
    engine.complete([COMPLETION], SamplingParams(max_tokens=4))  # warm up before timing
    begin = time.perf_counter()
    completed = engine.complete([COMPLETION], params)[0]
    filled = engine.infill([GAP], SamplingParams(max_tokens=48))[0]
    duration_s = time.perf_counter() - begin
    console.print("\n[bold]A function completed[/bold] (new text in green)\n")
    console.print(Text(COMPLETION, "dim") + Text(completed.text, "bold green"), soft_wrap=True)
    console.print("\n[bold]A gap filled[/bold] between a prefix and a suffix\n")
    prefix, suffix = GAP
    whole = Text(prefix, "dim") + Text(filled.text, "bold green") + Text(suffix, "dim")
    console.print(whole, soft_wrap=True)
    n_tokens = len(completed.token_ids) + len(filled.token_ids)
    console.print(f"{n_tokens / duration_s:,.0f} tokens per second, one at a time\n")
    print(NEXT)
