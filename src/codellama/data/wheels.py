"""Wheels: packages fetched by name with pip, kept in a folder, never installed or run.

In: `name` or `name==version`. Out: the path of a wheel, which is a zip file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def normalised_name(name: str) -> str:
    """A package name as the index compares it: `Zope.Interface` -> `zope-interface`."""
    return re.sub(r"[-_.]+", "-", name).lower()


_PACKAGE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+]+))?")


def split_pin(package: str) -> tuple[str, str | None]:
    """`name` or `name==version`; anything else could be read as an option by pip."""
    found = _PACKAGE.fullmatch(package)
    if not found:
        raise ValueError(f"packages: {package!r} is not a package: expected name or name==version")
    return found[1], found[2]


def cached_wheel(package: str, cache: Path) -> Path | None:
    """The wheel of `name` or `name==version` in the cache, if it is there."""
    name, version = split_pin(package)
    for wheel in sorted(cache.glob("*.whl"), reverse=True):
        parts = wheel.name.split("-")
        if normalised_name(parts[0]) == normalised_name(name) and version in (None, parts[1]):
            return wheel
    return None


def fetch_wheel(package: str, cache: Path, timeout_s: float = 600) -> Path:
    """Return the wheel of a package, fetching it with pip if the cache has none.

    Only built wheels are taken: a source distribution would run its own set-up code.

    Raises:
        OSError: pip could not fetch it; the message is pip's own.
        ValueError: the name is not a package name.
    """
    if wheel := cached_wheel(package, cache):
        return wheel
    # Fetched beside and then renamed: a wheel in the cache is whole.
    incoming = cache / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "-d", str(incoming)]
    command.append(package)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"pip download {package}: no answer within {timeout_s:.0f} s") from None
    wheel = cached_wheel(package, incoming)
    if done.returncode or not wheel:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise OSError(f"pip download {package}: {errors[-1] if errors else 'no wheel'}")
    return wheel.replace(cache / wheel.name)
