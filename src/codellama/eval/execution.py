"""Programs of samples, run in the sandbox and turned into verdicts.

There is no other way here to run what a model wrote. Statuses are those of a sandbox Outcome; an
`error` is the sandbox's own failure, which scoring retries and reports apart. Limits are processor
time: wall time is three times as long, so that a busy machine does not decide.
"""

from __future__ import annotations

import secrets
import sysconfig
from dataclasses import replace
from functools import cache
from typing import Any

from codellama import sandbox
from codellama.eval.task import USUAL, Patience, Verdict

_CALIBRATION = "total = 0\nfor i in range(3_000_000):\n    total += i * i % 7\n"
SCIENTIFIC: dict[str, Any] = {
    "packages": sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}),
    "timeout_s": 120.0,
    "memory_bytes": 4 << 30,  # libraries reserve address space for each thread
    "n_open_files": 256,
}
"""What programs get that import installed packages."""
TRUST = ("mode", "in_process", "used_objects", "n_calls", "n_retries")
"""What of an Outcome says how far a verdict can be trusted."""
END = "@end of the tests@"  # what a program holds in place of its mark
_NOMINAL_S = 0.25  # measured (0.23 to 0.26) on the machine that the limits were tried on


def judge_python(
    candidate: str, tests: str, timeout_s: float, patience: Patience = USUAL, setup: str = ""
) -> Verdict:
    """Run Python tests on a candidate that cannot reach them.

    Args:
        timeout_s: processor time of all checks together.
        setup: code of the benchmark that the tests need.
    """
    outcome = sandbox.judge(candidate, tests, **_limits(timeout_s, patience), setup=setup)
    return _verdict(outcome)


def run_program(
    program: str, language: str, limit_s: float, patience: Patience = USUAL, **limits: Any
) -> Verdict:
    """Run a program that holds its own tests, as MultiPL-E and DS-1000 publish them.

    It passes by ending with 0 after it wrote what takes the place of END, behind its tests: random
    in each run, so that an early exit fails. A program that reads itself can still forge that.
    """
    mark = secrets.token_hex(16)
    limits |= _limits(limit_s, patience)
    outcome = sandbox.run(program.replace(END, mark), language=language, **limits)
    outcome = replace(outcome, in_process=True)
    if outcome.passed and mark not in outcome.stdout:
        outcome = replace(outcome, status="failed", message="ended before its tests did")
    return _verdict(outcome)


def run_cases(
    program: str, cases: list[tuple[str, str]], timeout_s: float, patience: Patience = USUAL
) -> Verdict:
    """Run a Python program once for each (input, expected output), until one does not hold.

    Outputs agree when their lines do, without white space at the ends of lines and of the text.
    """
    cpu_s, n_retries, outcome = 0.0, 0, sandbox.Outcome("refused", message="no cases")
    for number, (given, expected) in enumerate(cases, start=1):
        outcome = sandbox.run(program, stdin=given, **_limits(timeout_s, patience))
        cpu_s, n_retries = cpu_s + outcome.cpu_s, n_retries + outcome.n_retries
        if outcome.passed and _lines(outcome.stdout) != _lines(expected):
            why = f"printed {outcome.stdout[:200]!r}, not {expected[:200]!r}"
            outcome = replace(outcome, status="failed", message=why)
        if not outcome.passed:
            why = outcome.message or _last_line(outcome.stderr)
            outcome = replace(outcome, message=f"test {number}: {why}")
            break
    return _verdict(replace(outcome, cpu_s=cpu_s, n_retries=n_retries))


@cache
def calibrate() -> float:
    """How many times slower than the nominal machine this one computes, at least 1, at most 8.

    Raises:
        NoIsolationError: the machine offers no isolation.
        ValueError: the sandbox does not run programs here.
    """
    outcome = min(
        (sandbox.run(_CALIBRATION, timeout_s=60) for _ in range(3)),
        key=lambda outcome: outcome.cpu_s if outcome.passed else float("inf"),
    )
    if outcome.status == "refused":
        raise sandbox.NoIsolationError(outcome.message)
    if not outcome.passed:
        raise ValueError(f"the sandbox cannot run programs: {outcome.status}: {outcome.message}")
    return min(8.0, max(1.0, outcome.cpu_s / _NOMINAL_S))


@cache
def missing_toolchain(language: str) -> str:
    """Why programs in a language cannot be run; empty where they can."""
    outcome = sandbox.run("", language=language)
    return outcome.message if outcome.status == "refused" else ""


@cache
def missing_modules(names: tuple[str, ...]) -> str:
    """Which Python packages programs in the sandbox cannot import; empty where all are there."""
    missing = [n for n in names if not sandbox.run(f"import {n}", **SCIENTIFIC).passed]
    return f"programs need {', '.join(missing)}, installed beside codellama" if missing else ""


def stretch() -> float:
    """How many times its processor time a program takes by the clock just now, 1 to 30."""
    outcome = sandbox.run(_CALIBRATION, timeout_s=120)
    return min(30.0, max(1.0, outcome.wall_s / max(outcome.cpu_s, 0.01)))


def _limits(timeout_s: float, patience: Patience) -> dict[str, Any]:
    cpu_s = timeout_s * patience.cpu
    # On a slow processor nothing sleeps for longer; only what computes must get its time.
    return {"cpu_s": cpu_s, "timeout_s": max(timeout_s * patience.wall, 1.5 * cpu_s)}


def _verdict(outcome: sandbox.Outcome) -> Verdict:
    message = "" if outcome.passed else outcome.message or _last_line(outcome.stderr)
    trust = {name: getattr(outcome, name) for name in TRUST}
    values = {"pass": float(outcome.passed)}
    return Verdict(outcome.status, values, message, outcome.cpu_s, trust=trust)


def _last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    return (text.strip().splitlines() or [""])[-1][:400]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
