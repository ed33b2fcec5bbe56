"""What a check found, as files: report.md, report.json, lists of images, a histogram of lengths."""

# pyright: basic
# matplotlib is only partly typed.

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cobra.data.prepare.check import CheckReport, SetReport
from cobra.runtime import write_atomically, write_text

_SHOWN = 20  # names in report.md and report.json; the text files have all
_QUANTILES = (0.5, 0.9, 0.99, 1.0)


def write_report(report: CheckReport, folder: Path) -> None:
    """Write report.md and report.json; `missing_images.txt` and `broken_images.txt` when there are any; lengths.png.

    Lists of an earlier check that no longer hold are removed.
    """
    write_text(folder / "report.json", json.dumps(_as_dict(report), indent=2, ensure_ascii=False))
    write_text(folder / "report.md", _as_markdown(report))
    lists = {
        "missing_images.txt": [name for part in report.sets for name in part.missing],
        "broken_images.txt": [f"{name}\t{why}" for part in report.sets for name, why in part.broken.items()],
        "orphans.txt": [name for part in report.sets for name in part.orphans],
    }
    for name, lines in lists.items():
        if lines:
            write_text(folder / name, "".join(f"{line}\n" for line in dict.fromkeys(lines)))
        else:
            (folder / name).unlink(missing_ok=True)
    counted = {part.name: part.lengths for part in report.sets if part.lengths is not None}
    if counted:
        _plot_lengths(folder / "lengths.png", counted, report.name)


def _numbers(part: SetReport) -> dict[str, int]:
    return {
        "rows": part.rows,
        "rows of text alone": part.text_rows,
        "rows that break the format": sum(part.problems.counts.values()),
        "empty answers": part.problems.empty_answers,
        "ids used again": part.duplicate_ids,
        "questions asked again about an image": part.duplicate_questions,
        "images": part.images,
        "images present": part.images - len(part.missing) - len(part.broken),
        "images missing": len(part.missing),
        "images broken": len(part.broken),
        "files that no row names": len(part.orphans),
    }


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    values = np.quantile(lengths, _QUANTILES, method="lower").astype(int).tolist()
    return dict(zip(("median", "90 %", "99 %", "longest"), values, strict=True))


def _as_dict(report: CheckReport) -> dict[str, Any]:
    sets = {
        part.name: {
            **_numbers(part),
            "first missing": part.missing[:_SHOWN],
            "first broken": dict(list(part.broken.items())[:_SHOWN]),
            "problems": part.problems.as_dict()["problems"],
            "tokens": None if part.lengths is None else _quantiles(part.lengths),
        }
        for part in report.sets
    }
    return {
        "name": report.name,
        "check": "full" if report.full else "fast",
        "is_good": report.is_good,
        "unmet": report.unmet,
        "sets": sets,
    }


def _as_markdown(report: CheckReport) -> str:
    how = "every image was decoded" if report.full else "images are there and their headers can be read"
    lines = [
        f"# {report.name}: {'complete' if report.is_good else 'not in order'}",
        "",
        f"{'Full' if report.full else 'Fast'} check: {how}.",
    ]
    if report.unmet:
        lines += ["", "## Not as expected", *(f"- {text}" for text in report.unmet)]
    table = {part.name: _numbers(part) for part in report.sets}
    if table:
        lines += ["", "| | " + " | ".join(table) + " |", "|---|" + "---:|" * len(table)]
        for key in next(iter(table.values())):
            lines.append(f"| {key} | " + " | ".join(f"{numbers[key]:,}" for numbers in table.values()) + " |")
    for part in report.sets:
        if part.lengths is not None:
            found = ", ".join(f"{key} {value:,}" for key, value in _quantiles(part.lengths).items())
            lines += ["", f"{part.name}: text tokens of a row: {found} (lengths.png)."]
    for part in report.sets:
        lines += _examples(part)
    return "\n".join(lines) + "\n"


def _examples(part: SetReport) -> list[str]:
    """List the first of all that is wrong with a set."""
    kinds = {
        "missing, all in missing_images.txt": part.missing,
        "broken, all in broken_images.txt": [f"{name}: {why}" for name, why in part.broken.items()],
        **{kind: part.problems.first[kind] for kind in part.problems.counts},
    }
    lines = list[str]()
    for kind, found in kinds.items():
        if found:
            lines += ["", f"## {part.name}: {kind}", *(f"- {text}" for text in found[:_SHOWN])]
    return lines


def _plot_lengths(file: Path, lengths: dict[str, np.ndarray], title: str) -> None:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    longest = max(int(values.max()) for values in lengths.values())
    bins = np.unique(np.geomspace(1, longest + 1, 60).astype(int)).tolist()
    for name, values in lengths.items():
        axes.hist(values, bins=bins, histtype="step", linewidth=1.5, label=f"{name} ({len(values):,} rows)")
    axes.set(xscale="log", xlabel="text tokens of a row", ylabel="rows", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(file, partial(figure.savefig, dpi=120))
