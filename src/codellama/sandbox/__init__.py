"""Running programs that a model wrote: isolated, bounded, and judged out of their reach.

`run` is for programs with standard input and output, `judge` for functions with tests. Both return
an Outcome whatever the program does; docs/sandbox.md explains what each layer stops.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from codellama.sandbox.outcome import Limits, Outcome

if TYPE_CHECKING:
    from codellama.sandbox.jailer import NoIsolationError
    from codellama.sandbox.pool import Mode, Pool

_LAZY = {"Pool": "pool", "NoIsolationError": "jailer"}  # importing them is slow
__all__ = ["Limits", "NoIsolationError", "Outcome", "Pool", "judge", "run", "run_many"]


def run(
    program: str,
    stdin: str | bytes = "",
    timeout_s: float = 5.0,
    memory_bytes: int = 512 << 20,
    language: str = "python",
    mode: Mode = "namespaces",
    packages: Iterable[str] = (),
    **limits: Any,
) -> Outcome:
    """Run a program; further limits are the fields of `Limits`.

    `mode="none"` runs it without any isolation, able to read and change all that you can.
    `packages` are folders that a Python program may import from besides the standard library.

    Raises:
        ValueError: an unknown language, mode or limit. Never for what the program did.
    """
    limits |= {"timeout_s": timeout_s, "memory_bytes": memory_bytes}
    return _with_pool(mode, lambda pool: pool.run(program, stdin, language, **limits), packages)


def judge(
    candidate: str,
    tests: str | Iterable[str],
    timeout_s: float = 5.0,
    entry_point: str | None = None,
    setup: str = "",
    in_process: bool = False,
    mode: Mode = "namespaces",
    **limits: Any,
) -> Outcome:
    """Check a Python program with tests that run in another jail; `passed` is decided there.

    Args:
        candidate: the program; what it defines is called by the tests.
        tests: statements such as `assert f(1) == 2` (one text or a list), functions named test...,
            unittest cases; or with `entry_point` a function `check(candidate)`.
        timeout_s: for the candidate and all checks together.
        entry_point: the name that `check` is called with.
        setup: trusted code that runs before the tests and whose names come before the candidate's:
            MBPP's setup and imports; for HumanEval the prompt, whose helpers the tests use.
        in_process: run the tests inside the candidate's process, for tests that need its classes
            there. The candidate can then forge the verdict; the Outcome says so.

    Raises:
        ValueError: an unknown mode or limit, or tests that cannot check anything.
    """
    limits["timeout_s"] = timeout_s
    return _with_pool(
        mode, lambda pool: pool.judge(candidate, tests, entry_point, setup, in_process, **limits)
    )


def run_many(programs: Iterable[str | dict[str, Any]], **shared: Any) -> list[Outcome]:
    """Run many programs on all cores, each a text or the arguments of `run`; outcomes in order."""
    calls = [{**shared, **(p if isinstance(p, dict) else {"program": p})} for p in programs]
    refused = _with_pool("namespaces", lambda pool: pool)
    if isinstance(refused, Outcome):
        return [refused] * len(calls)
    return refused.run_many(calls)


def _with_pool(mode: Mode, do: Any, packages: Iterable[str] = ()) -> Any:
    from codellama.sandbox.jailer import NoIsolationError
    from codellama.sandbox.pool import shared_pool

    try:
        pool = shared_pool(mode, tuple(packages))
    except NoIsolationError as error:
        return Outcome("refused", message=str(error))
    return do(pool)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'codellama.sandbox' has no attribute {name!r}")
    return getattr(import_module(f"codellama.sandbox.{_LAZY[name]}"), name)
