"""The data card: what a corpus holds, for people, beside the corpus.

In: a corpus folder's manifest. Out: README.md and corpus.png in the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codellama.artifact import read_manifest
from codellama.data.corpus import KIND

SHOWN = 15  # rows of a table


def write_card(folder: Path) -> None:
    """Write the data card of a corpus."""
    manifest = read_manifest(folder, KIND)
    (folder / "README.md").write_text(card(manifest), encoding="utf-8")
    _plot(manifest, folder / "corpus.png")


def card(manifest: dict[str, Any]) -> str:
    """The card as Markdown."""
    config, inputs = manifest["config"], manifest["inputs"]
    train, held = manifest["n_documents"]["train"], manifest["n_documents"]["validation"]
    total = sum(manifest["n_bytes"].values())
    lines = [
        "# Data card",
        "",
        f"{train} documents to train on and {held} held out by {manifest['held_out_by']}, "
        f"{total / 1e6:.1f} MB of text, made from {inputs['n_files']} files and rows.",
        f"Fingerprint `{manifest['fingerprint'][:16]}`. The recipe's corpus section, every shard's "
        "checksum and all counts are in `manifest.json`.",
        "",
        "![documents by language, and reasons for dropping others](corpus.png)",
    ]
    for name in ("sources", "kinds", "languages", "licences"):
        lines += ["", f"## By {name[:-1]}", "", *_counts(manifest[name])]
    near = config["near_duplicates"]
    lines += ["", "## Left out", "", "| reason | files | for example |", "|---|---:|---|"]
    for reason, drop in manifest["dropped"].items():
        example = drop["examples"][0].replace("|", "\\|") if drop["examples"] else ""
        lines.append(f"| {reason} | {drop['n']} | `{example}` |")
    others = {name: n for name, n in inputs["n_other_files"].items() if n}
    lines += ["", f"Not examined, as in no wanted language: {others or 'none'}."]
    if inputs["unavailable"]:
        lines.append(f"Not available: {inputs['unavailable']}.")
    lines += ["", "## Duplicates", ""]
    lines.append(
        f"Near duplicates by MinHash: estimates from two standard deviations below "
        f"{near['threshold']}, {near['ngram']}-grams of words, {near['n_hashes']} hashes in "
        f"{near['n_bands']} bands."
        if near
        else "Exact duplicates only (the recipe has no `near_duplicates`)."
    )
    if sizes := list(manifest["cluster_sizes"].items())[:SHOWN]:
        lines += ["", "| documents in a cluster | clusters |", "|---:|---:|"]
        lines += [f"| {size} | {n} |" for size, n in sizes]
    if manifest["redacted"]:
        found = ", ".join(f"{n} × `{name}`" for name, n in manifest["redacted"].items())
        lines += ["", "## Secrets and personal data", "", f"Replaced: {found}."]
    if benchmarks := manifest.get("benchmarks"):
        action = config["benchmarks"]["action"]
        lines += ["", "## Benchmarks", "", f"Documents with a hit: {action}."]
        lines += ["", "| benchmark | texts | passages | too short | documents hit |"]
        lines.append("|---|---:|---:|---:|---:|")
        fields = ("n_texts", "n_passages", "n_too_short", "n_documents_hit")
        for name, row in benchmarks.items():
            lines.append(f"| {' | '.join([name, *(str(row[field]) for field in fields)])} |")
    return "\n".join(lines) + "\n"


def _counts(groups: dict[str, dict[str, int]]) -> list[str]:
    rows = sorted(groups.items(), key=lambda item: -item[1]["n_bytes"])
    lines = ["| | documents | MB |", "|---|---:|---:|"]
    for name, row in rows[:SHOWN]:
        lines.append(f"| {name} | {row['n_documents']} | {row['n_bytes'] / 1e6:.2f} |")
    if rest := rows[SHOWN:]:
        n, size = (sum(row[key] for _, row in rest) for key in ("n_documents", "n_bytes"))
        lines.append(f"| {len(rest)} others | {n} | {size / 1e6:.2f} |")
    return lines


def _plot(manifest: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    languages = sorted(manifest["languages"].items(), key=lambda item: item[1]["n_bytes"])[-SHOWN:]
    drops = [(reason, drop["n"]) for reason, drop in manifest["dropped"].items()][::-1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh([n for n, _ in languages], [row["n_bytes"] / 1e6 for _, row in languages])
    left.set_xlabel("MB of text")
    right.barh([reason for reason, _ in drops], [n for _, n in drops], color="C1")
    right.set_xlabel("files left out")
    figure.savefig(path, metadata={"Software": None})  # the same bytes from every version
