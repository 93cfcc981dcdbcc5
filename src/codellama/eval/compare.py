"""Two models on the same problems: which flipped, and could it be chance?"""

from __future__ import annotations

from typing import Any

from codellama.eval.metrics import paired_p_value


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Compare two results of one task, measure by measure.

    Raises:
        ValueError: different tasks, or problems that are not the same.
    """
    if before["task"] != after["task"]:
        raise ValueError(f"results of {before['task']} and {after['task']}: expected one task")
    rows = [{row["task_id"]: row for row in results["problems"]} for results in (before, after)]
    if only := sorted(rows[0].keys() ^ rows[1].keys()):
        raise ValueError(
            f"{before['task']}: {len(only)} problems are in only one of the results: {only[0]}"
        )
    measures = {}
    for name in dict.fromkeys(name for row in before["problems"] for name in row["values"]):
        shared = [i for i in rows[0] if all(name in side[i]["values"] for side in rows)]
        if not shared:
            continue
        a, b = ([side[i]["values"][name] for i in shared] for side in rows)
        measures[name] = {
            "before": sum(a) / len(a),
            "after": sum(b) / len(b),
            "n": len(shared),
            "won": [i for i, x, y in zip(shared, a, b, strict=True) if y > x],
            "lost": [i for i, x, y in zip(shared, a, b, strict=True) if y < x],
            "p_value": paired_p_value(a, b),
        }
    return {"task": before["task"], "measures": measures}


def as_lines(compared: dict[str, Any]) -> list[str]:
    """The comparison for people."""
    lines = []
    for name, row in compared["measures"].items():
        lines.append(
            f"{compared['task']} {name}: {row['before']:.4f} -> {row['after']:.4f} "
            f"({row['n']} problems, p = {row['p_value']:.3g}, paired)"
        )
        flips = [(word, row[word]) for word in ("won", "lost") if row[word]]
        lines += [f"  {word} {len(which)}: {' '.join(which)}" for word, which in flips]
    return lines
