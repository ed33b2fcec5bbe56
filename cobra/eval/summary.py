"""One model on several benchmarks: summary.json, summary.md and pictures, beside the paper's table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cobra.eval.benchmark import PAPER
from cobra.eval.gallery import Example, plot_examples
from cobra.eval.markdown import NOTHING, percent, plain, signed, span, table
from cobra.eval.paper import LLAVA, NOTES, ROWS, SOURCE
from cobra.eval.plots import Bar, plot_models
from cobra.eval.report import RULES
from cobra.releases import COLUMNS
from cobra.runtime import write_text


def write(folder: Path, results: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> None:
    """Write the summary, and examples.png.

    Args:
        folder: made if it is not there.
        results: of one model, as `results.json` holds them; of a column that is there twice, the last counts.
        examples: answers to be drawn.
    """
    model, name = str(results[0]["model"]), str(results[0]["paper_row"])
    columns: dict[str, Any] = dict.fromkeys(COLUMNS)
    for one in results:
        for column, found in one["columns"].items():
            columns[column] = {"benchmark": one["benchmark"], **found, "difference": _difference(found)}
    summary = {"model": model, "paper_row": name, "columns": columns}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    pictures = ["", "![examples](examples.png)"] * bool(examples)
    write_text(folder / "summary.md", "\n".join([*_report(model, name, columns), *pictures]) + "\n")
    _plot(folder / "summary.png", model, name, {column: found for column, found in columns.items() if found})
    if examples:
        plot_examples(folder / "examples.png", examples, f"{model}: an answer to each, drawn at random", num_columns=3)


def _difference(column: Mapping[str, Any]) -> float | None:
    """Return how far the paper's rule is from the paper's number, where both are of the same questions."""
    if column["reference"] is None or not column["is_whole"] or PAPER not in column["rules"]:
        return None
    return column["rules"][PAPER]["accuracy"] - column["reference"]


def _report(model: str, name: str, columns: Mapping[str, Any]) -> list[str]:
    head = ["benchmark", "questions"]
    for rule in RULES.values():
        head += [f"{rule} (%)", "95 % interval"]
    head += [f"{ROWS[name].label} in the paper", "difference", LLAVA.label]
    rows: list[list[str]] = []
    for column, found in columns.items():
        row = [plain(column), f"{found['questions']:,}" if found else "not evaluated"]
        for rule in RULES:
            numbers = found["rules"].get(rule) if found else None
            row += [percent(numbers["accuracy"]), span(numbers["interval_95"])] if numbers else [NOTHING, NOTHING]
        row += [percent(ROWS[name].scores.get(column)), signed(found["difference"] if found else None)]
        rows.append([*row, percent(LLAVA.scores.get(column))])
    num_missing = sum(columns[column] is None for column in COLUMNS)
    lines = [f"# {plain(model)}", "", *table(head, rows)]
    lines.append(f"The difference is that of the paper's rule from the paper's number ({SOURCE}).")
    if any(found and found["reference"] is not None and not found["is_whole"] for found in columns.values()):
        lines.append(
            "Where there is none, other questions were asked than the paper's: it would be no fair comparison."
        )
    lines += [f"{num_missing} of the paper's {len(COLUMNS)} columns are not evaluated."] * bool(num_missing)
    lines += [note for (row, column), note in NOTES.items() if row == name and columns.get(column)]
    return [*lines, "", "![all benchmarks](summary.png)"]


def _plot(file: Path, model: str, name: str, columns: Mapping[str, Any]) -> None:
    """Draw the paper's rule, where there is one: it is what the paper's numbers compare to."""
    others = {column for column, found in columns.items() if found["reference"] is not None and not found["is_whole"]}
    shown = {column: f"{column}*" if column in others else column for column in columns}
    ours: list[Bar] = []
    for column, found in columns.items():
        numbers = found["rules"].get(PAPER) or next(iter(found["rules"].values()))
        low, high = numbers["interval_95"]
        ours.append(Bar(name=shown[column], percent=numbers["accuracy"], interval=(low, high)))
    models = {model: ours}
    for row, label in ((ROWS[name], f"{ROWS[name].label} in the paper"), (LLAVA, LLAVA.label)):
        bars = [Bar(name=shown[column], percent=row.scores[column]) for column in columns if column in row.scores]
        models |= {label: bars} if bars else {}
    remark = "\n* other questions than the paper's: no fair comparison" if others else ""
    plot_models(file, models, list(shown.values()), f"{model} (paper's rule, 95 % intervals){remark}")
