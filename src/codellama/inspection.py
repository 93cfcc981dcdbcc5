"""What a path is: a model in any format, a corpus, a run or one of its states; as plain values.

In: a folder, a file or a hub name. Out: a dictionary whose first key is `kind`, and the same as
lines to read. The facts of a model come from `describe`; those of a corpus and a run from the
manifests and metrics that lie in their folders. Nothing is opened that these do not name.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codellama.artifact import MANIFEST
from codellama.rows import read_rows

RUN_RECORD = "recipe.json"


def inspect_path(path: str) -> dict[str, Any]:
    """Say what stands at a path.

    Raises:
        ValueError: nothing, or nothing that is known.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file() and not (folder / "config.json").exists():
        manifest = _read_object(folder / MANIFEST)
        if manifest.get("kind") == "corpus":
            return _corpus(manifest)
        if manifest.get("kind") == "train-state":
            return {"kind": "train-state", "step": manifest.get("step")}
    if (folder / RUN_RECORD).is_file() and not (folder / "config.json").exists():
        return _run(folder)
    return _model(path)


def as_lines(facts: dict[str, Any]) -> str:
    """Facts as `name  value` lines, tables indented below their name."""
    return "\n".join(_lines(facts, ""))


def _lines(facts: dict[str, Any], indent: str, in_bytes: bool = False) -> list[str]:
    width = max((len(str(name)) for name in facts), default=0)
    lines: list[str] = []
    for name, value in facts.items():
        are_bytes = in_bytes or str(name).endswith("_bytes")
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", *_lines(value, indent + "  ", are_bytes)]
        else:
            shown = _size(value) if are_bytes and isinstance(value, int) else _text(value)
            if "\n" in shown:  # a text, below its name
                shown = "\n" + textwrap.indent(shown.rstrip(), f"{indent}    ")
            lines.append(f"{indent}{name!s:{width}}  {shown}")
    return lines


def _size(n_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return f"{n_bytes} bytes"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.10g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(part) for part in value) or "-"
    return "-" if value is None or value == {} else str(value)


def _model(path: str) -> dict[str, Any]:
    """Shape, abilities and needs of weights in any format; memory by precision and context."""
    from codellama.describe import describe

    found = describe(path)
    return {
        "kind": "model",
        "path": str(found.path),
        "format": found.kind,
        "variants": list(found.variants),
        "n_params": found.n_params,
        "context": found.context,
        "rope_theta": found.rope_theta,
        "vocab_size": found.vocab_size,
        "infilling": found.infilling,
        "chat_format": found.chat_format,
        "n_params_stored_as": found.precisions,
        "file_bytes": found.file_bytes,
        "shape": asdict(found.config),
        "memory_bytes": {
            precision: {f"context {context}": size for context, size in sizes.items()}
            for precision, sizes in found.memory_bytes.items()
        },
    }


def _corpus(manifest: dict[str, Any]) -> dict[str, Any]:
    """Counts, where documents come from, and why others were dropped."""
    names = ("n_documents", "n_bytes", "held_out_by", "held_out", "sources", "kinds", "languages")
    names += ("licences", "redacted", "cluster_sizes")
    facts = {name: manifest[name] for name in names if name in manifest}
    dropped = manifest.get("dropped", {})
    return {
        "kind": "corpus",
        **facts,
        "dropped": {reason: drop["n"] for reason, drop in dropped.items()},
        "dropped_examples": {
            reason: drop["examples"] for reason, drop in dropped.items() if drop.get("examples")
        },
        "benchmark_hits": {
            name: row["n_documents_hit"]
            for name, row in manifest.get("benchmarks", {}).items()
            if row["n_documents_hit"]
        },
        "n_shards": len(manifest.get("shards", [])),
        "unavailable": manifest.get("inputs", {}).get("unavailable", {}),
        "fingerprint": manifest.get("fingerprint"),
        "code_version": manifest.get("code_version"),
    }


def _run(folder: Path) -> dict[str, Any]:
    """How far a run is, how fast, and its last losses."""
    record = _read_object(folder / RUN_RECORD)
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    last = steps[-1] if steps else {}
    recent = sorted(row["tokens_per_s"] for row in steps[-100:] if "tokens_per_s" in row)
    settings = record.get("settings", {})
    return {
        "kind": "run",
        "stage": record.get("stage"),
        "model": record.get("model", {}).get("name"),
        "finished": (folder / "checkpoint").is_dir(),
        "step": last.get("step", 0),
        "steps": settings.get("steps"),
        "tokens": last.get("tokens", 0),
        "loss": last.get("loss"),
        "validation": validations[-1] if validations else {},
        "tokens_per_s": recent[len(recent) // 2] if recent else None,
        "mfu": last.get("mfu"),
        "stall_share": last.get("stall_share"),
        "states": sorted(state.name for state in (folder / "states").glob("step-*")),
        "corpus_fingerprint": record.get("corpus_fingerprint"),
        "settings": settings,
    }


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values
