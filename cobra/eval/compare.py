"""Several models on the same questions: who is better, by how much, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from cobra.errors import DataError
from cobra.eval.evaluations import Run, Scored, shared_questions
from cobra.eval.markdown import NOTHING, percent, plain, signed, span, table
from cobra.eval.plots import Bar, plot_models
from cobra.eval.rules.intervals import holm, interval, sign_flip
from cobra.releases import COLUMNS
from cobra.runtime import write_text

ALL_PAIRS = 4  # so many runs or fewer: each is compared with each, otherwise all with the first
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models on the questions of a column that both answered; accuracies and intervals are in percent."""

    column: str
    first: str
    second: str
    questions: int
    first_accuracy: float
    second_accuracy: float
    difference: float  # second minus first
    interval_95: tuple[float, float]
    p: float
    p_holm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Each run's own accuracies, column -> model -> bar, and all pairs."""

    rule: str
    runs: list[str]
    accuracies: dict[str, dict[str, Bar]]
    pairs: list[Pair]


def compare(runs: Sequence[Run], rule: str) -> Comparison:
    """Compare runs on the questions that both of a pair answered.

    Raises:
        DataError: there is one run only, one shares no question with the first, or one is about other images.
    """
    if len(runs) < 2:
        raise DataError("There must be two runs or more to compare.")
    columns = list(dict.fromkeys(column for run in runs for column in run.columns))
    columns.sort(key=lambda column: COLUMNS.index(column) if column in COLUMNS else len(COLUMNS))
    for run in runs[1:]:
        if not any(runs[0].columns[column].keys() & run.columns.get(column, {}) for column in runs[0].columns):
            raise DataError(
                f"{runs[0].name} and {run.name} have no question in common: the first was evaluated on "
                f"{', '.join(runs[0].columns)}, the second on {', '.join(run.columns)}."
            )
    chosen = list(combinations(runs, 2)) if len(runs) <= ALL_PAIRS else [(runs[0], run) for run in runs[1:]]
    pairs = [
        pair
        for column in columns
        for first, second in chosen
        if column in first.columns and column in second.columns
        for pair in _pair(column, first, second)
    ]
    corrected = holm([pair.p for pair in pairs])
    return Comparison(
        rule=rule,
        runs=[run.name for run in runs],
        accuracies={
            column: {run.name: _bar(column, run.columns[column]) for run in runs if run.columns.get(column)}
            for column in columns
        },
        pairs=[replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)],
    )


def _pair(column: str, first: Run, second: Run) -> list[Pair]:
    """Return the comparison of two runs on a column, or nothing where no question is in common."""
    ours, theirs = first.columns[column], second.columns[column]
    common = shared_questions(column, [first, second])
    if not common:
        return []
    images, parts = [ours[one].image for one in common], [ours[one].part for one in common]
    differences = [theirs[one].score - ours[one].score for one in common]
    before, after = _accuracy([ours[one] for one in common]), _accuracy([theirs[one] for one in common])
    return [
        Pair(
            column=column,
            first=first.name,
            second=second.name,
            questions=len(common),
            first_accuracy=before,
            second_accuracy=after,
            difference=after - before,
            interval_95=interval(differences, images, parts),
            p=sign_flip(differences, images, parts),
        )
    ]


def _accuracy(rows: Sequence[Scored]) -> float:
    """Return the mean of the parts' accuracies, in percent."""
    parts: dict[str, list[float]] = {}
    for row in rows:
        parts.setdefault(row.part, []).append(row.score)
    return 100 * fmean(fmean(values) for values in parts.values())


def _bar(column: str, scores: dict[str, Scored]) -> Bar:
    rows = list(scores.values())
    span_95 = interval([row.score for row in rows], [row.image for row in rows], [row.part for row in rows])
    return Bar(name=column, percent=_accuracy(rows), interval=span_95, total=len(rows))


def report(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    runs = comparison.runs
    rows = [
        [
            plain(column),
            *(
                f"{bars[run].percent:.2f} ({span(bars[run].interval or ())})" if run in bars else NOTHING
                for run in runs
            ),
        ]
        for column, bars in comparison.accuracies.items()
    ]
    lines = [
        f"# {' and '.join(map(plain, runs))}",
        "",
        f"Accuracy in percent by the {comparison.rule} rule, with 95 % intervals (bootstrap over images).",
        "",
        *table(["benchmark", *map(plain, runs)], rows),
        "## Differences",
        "",
    ]
    head = [
        "benchmark",
        "first",
        "second",
        "questions",
        "first (%)",
        "second (%)",
        "difference",
        "95 % interval",
        "p",
        "p (Holm)",
    ]
    cells: list[list[str]] = []
    for pair in comparison.pairs:
        mark = "**" if pair.p_holm < SIGNIFICANT else ""
        cells.append([
            plain(pair.column), plain(pair.first), plain(pair.second), f"{pair.questions:,}",
            percent(pair.first_accuracy), percent(pair.second_accuracy), f"{mark}{signed(pair.difference)}{mark}",
            span(pair.interval_95), f"{pair.p:.4f}", f"{pair.p_holm:.4f}",
        ])  # fmt: skip
    lines += table(head, cells, num_names=3)
    lines.append(
        "Second minus first, on the questions that both answered. Interval: paired bootstrap over images. p: two-sided "
        "paired permutation test, the signs of all differences of an image flipped together. Holm: corrected for the "
        f"{len(cells)} comparison{'s' * (len(cells) > 1)} of this table; bold where below {SIGNIFICANT}."
    )
    return "\n".join(lines) + "\n"


def write(folder: Path, comparison: Comparison) -> None:
    """Write compare.md, compare.json and compare.png."""
    runs, columns = comparison.runs, list(comparison.accuracies)
    data = asdict(comparison)
    write_text(folder / "compare.json", json.dumps(data, indent=2) + "\n")
    write_text(folder / "compare.md", report(comparison) + "\n![accuracies and differences](compare.png)\n")
    models = {run: [bars[run] for bars in comparison.accuracies.values() if run in bars] for run in runs}
    differences = {
        run: [
            Bar(name=pair.column, percent=pair.difference, interval=pair.interval_95)
            for pair in comparison.pairs
            if (pair.first, pair.second) == (runs[0], run)
        ]
        for run in runs[1:]
    }
    title = f"{comparison.rule} rule, 95 % intervals"
    plot_models(folder / "compare.png", models, columns, title, differences=differences)
