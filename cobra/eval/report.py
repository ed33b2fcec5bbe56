"""Scores -> results.json and report.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cobra.eval.benchmark import Scores
from cobra.runtime import write_text


def write_results(folder: Path, facts: dict[str, Any], scores: Scores) -> None:
    """Write results.json: `facts` (benchmark, model, settings, times) and the scores in percent."""
    results = facts | {
        "num_questions": scores.overall.total,
        "accuracy": scores.overall.percent,
        "by_type": {
            name: {"accuracy": tally.percent, "num_questions": tally.total} for name, tally in scores.by_type.items()
        },
        "rules": scores.as_dict(),
    }
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def write_report(folder: Path, facts: dict[str, Any], scores: Scores) -> None:
    """Write report.md: the numbers as tables, with the pictures."""
    rows = [f"| {name} | {tally.percent:.2f} | {tally.total:,} |" for name, tally in scores.by_type.items()]
    lines = [
        f"# {facts['benchmark']}: {facts['model']}",
        "",
        f"**{scores.overall.percent:.2f} %** of {scores.overall.total:,} questions.",
        "",
        *_rules(scores),
        "",
        "| question type | accuracy (%) | questions |",
        "|---|---:|---:|",
        *rows,
        f"| **all** | **{scores.overall.percent:.2f}** | **{scores.overall.total:,}** |",
        "",
        *(f"* {key}: {value}" for key, value in facts.items()),
        "",
        "![accuracy by question type](by_type.png)",
        "",
        "![example images](examples.png)",
    ]
    write_text(folder / "report.md", "\n".join(lines) + "\n")


def _rules(scores: Scores) -> list[str]:
    """One row for each rule and part."""
    rows = ["| rule | part | accuracy (%) | 95 % interval | questions | |", "|---|---|---:|---:|---:|---|"]
    for rule, parts in scores.parts.items():
        for name, part in parts.items():
            low, high = part.interval
            more = ", ".join(f"{key} {round(value, 2):g}" for key, value in part.details.items() if value is not None)
            rows.append(
                f"| {rule} | {name} | {part.accuracy:.2f} | {low:.2f} to {high:.2f} | {part.num_questions:,} | {more} |"
            )
    return rows
