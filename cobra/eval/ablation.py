"""The paper's ablation table at tiny size: each row's distance from the full model, over seeds, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobra.errors import DataError
from cobra.eval import paper
from cobra.eval.evaluations import Run, read_runs, shared_questions
from cobra.eval.rules.intervals import central_95, redrawn, with_seeds
from cobra.releases import COLUMNS

FULL = "tiny-full"
ROWS = {  # experiment -> the paper's row
    FULL: "cobra-3b",
    "tiny-siglip": "cobra-3b-siglip",
    "tiny-ldpv2": "cobra-3b-ldpv2",
    "tiny-base": "cobra-3b-base",
    "tiny-one-epoch": "cobra-3b-one-epoch",
    "tiny-aligned": "cobra-3b-aligned",
}
LABELS = {row: "full" if row == FULL else paper.ROWS[name].label for row, name in ROWS.items()}

Weights: TypeAlias = Mapping[str, float]
Verdict: TypeAlias = Literal["appears", "the opposite appears", "does not appear", "cannot be told"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number of ours in percent, and the paper's; weighted sums of accuracies."""

    ours: float
    interval_95: tuple[float, float]
    paper: float

    @property
    def verdict(self) -> Verdict:
        """What becomes of a difference that the paper reports.

        It appears where the whole interval is on the paper's side of 0. Where 0 is inside, a difference as large as the
        paper's is outside (it does not appear) or inside too (it cannot be told).
        """
        low, high = self.interval_95 if self.paper > 0 else (-self.interval_95[1], -self.interval_95[0])
        if low > 0:
            return "appears"
        if high < 0:
            return "the opposite appears"
        return "does not appear" if high < abs(self.paper) else "cannot be told"


def mean_of(columns: Sequence[str]) -> Weights:
    """Return the weights of a mean."""
    return dict.fromkeys(columns, 1 / len(columns))


@dataclass(frozen=True)
class Ablation:
    """All evaluations that there are: row -> seed -> scores of the questions that all rows and seeds answered."""

    rule: str
    runs: Mapping[str, Mapping[str, Run]]

    @cached_property
    def seeds(self) -> list[str]:
        """All seeds that any row has."""
        return sorted({seed for runs in self.runs.values() for seed in runs}, key=lambda seed: (len(seed), seed))

    @cached_property
    def questions(self) -> dict[str, list[str]]:
        """Column -> ids."""
        found: dict[str, list[str]] = {}
        for column in COLUMNS:
            runs = [run for of_row in self.runs.values() for run in of_row.values() if column in run.columns]
            found |= {column: shared} if runs and (shared := shared_questions(column, runs)) else {}
        return found

    @cached_property
    def accuracies(self) -> dict[str, dict[str, dict[str, float]]]:
        """Row -> seed -> column -> percent."""
        return {
            row: {
                seed: {column: self._accuracy(run, column) for column in self.questions if column in run.columns}
                for seed, run in runs.items()
            }
            for row, runs in self.runs.items()
        }

    def _accuracy(self, run: Run, column: str) -> float:
        parts: dict[str, list[float]] = {}
        for one in self.questions[column]:
            scored = run.columns[column][one]
            parts.setdefault(scored.part, []).append(scored.score)
        return 100 * fmean(map(fmean, parts.values()))

    def of_seeds(self, row: str, columns: Weights) -> dict[str, float]:
        """Return a weighted sum of columns for each seed of a row that has all of them."""
        return {
            seed: sum(weight * found[column] for column, weight in columns.items())
            for seed, found in self.accuracies.get(row, {}).items()
            if columns.keys() <= found.keys()
        }

    def spread(self, columns: Weights) -> tuple[float, int]:
        """Return the variance among seeds of a weighted sum of columns, and its degrees of freedom.

        Two seeds say next to nothing about their own spread, so that of all rows is taken for each.
        """
        groups = [list(found.values()) for row in self.runs if len(found := self.of_seeds(row, columns)) > 1]
        freedom = sum(len(values) - 1 for values in groups)
        squares = sum((value - fmean(values)) ** 2 for values in groups for value in values)
        return squares / max(1, freedom), freedom

    def estimate(self, rows: Weights, columns: Weights) -> Estimate | None:
        """Return a weighted sum of rows and columns, or None where a row has no seed with all of the columns.

        The questions' part of the interval is a bootstrap over images, the same draws for all rows, so that
        differences are paired. The seeds' part is added where any row has two of them.
        """
        by_seed = {row: self.of_seeds(row, columns) for row in rows}
        if not all(by_seed.values()):
            return None
        means = np.zeros(len(next(iter(self._redrawn.values()))))
        for (row, weight), (column, share) in product(rows.items(), columns.items()):
            for seed in by_seed[row]:  # those alone that `ours` is of
                means = means + weight * share / len(by_seed[row]) * self._redrawn[row, seed, column]
        variance, freedom = self.spread(columns)
        if freedom:
            of_mean = variance * sum(weight**2 / len(by_seed[row]) for row, weight in rows.items())
            means = with_seeds(means, of_mean, freedom)
        return Estimate(
            ours=sum(weight * fmean(by_seed[row].values()) for row, weight in rows.items()),
            interval_95=central_95(means),
            paper=paper_sum(rows, columns),
        )

    def accuracy(self, row: str, columns: Weights) -> Estimate | None:
        """Return a row's accuracy, or mean accuracy; its interval stays within 0 to 100."""
        found = self.estimate({row: 1}, columns)
        if found is None:
            return None
        low, high = found.interval_95
        return Estimate(ours=found.ours, interval_95=(max(0, low), min(100, high)), paper=found.paper)

    def difference(self, row: str, columns: Weights, *, against: str = FULL) -> Estimate | None:
        """Return how far a row is from another one."""
        return self.estimate({row: 1, against: -1}, columns)

    @cached_property
    def _redrawn(self) -> dict[tuple[str, str, str], NDArray[np.float64]]:
        """(row, seed, column) -> percent on redrawn sets of images."""
        cells: list[tuple[str, str]] = []  # column, question
        images: list[str] = []
        parts: list[tuple[str, str]] = []
        for column, ids in self.questions.items():
            anyone = next(run for runs in self.runs.values() for run in runs.values() if column in run.columns)
            cells += [(column, one) for one in ids]
            images += [anyone.columns[column][one].image for one in ids]
            parts += [(column, anyone.columns[column][one].part) for one in ids]
        runs = [(row, seed, run) for row, of_row in self.runs.items() for seed, run in of_row.items()]
        means = redrawn([[_score(run, *cell) for cell in cells] for *_, run in runs], images, parts)
        names = list(dict.fromkeys(parts))
        return {
            (row, seed, column): 100 * np.nanmean(means[:, i, [name[0] == column for name in names]], axis=1)
            for i, (row, seed, run) in enumerate(runs)
            for column in self.questions
            if column in run.columns
        }


def _score(run: Run, column: str, question: str) -> float:
    return run.columns[column][question].score if column in run.columns else float("nan")


def paper_sum(rows: Weights, columns: Weights) -> float:
    """Return a weighted sum of rows and columns of the paper's ablation table, in percent."""
    total = 0.0
    for (row, weight), (column, share) in product(rows.items(), columns.items()):
        score = paper.ROWS[ROWS[row]].scores[column]
        total += weight * share * (paper.ABLATED.get(column, score) if row == FULL else score)
    return round(total, 6)  # 0 where it is 0


def read(folder: Path, rule: str) -> Ablation:
    """Read the evaluations `<folder>/seed-*/<benchmark>/<row>` that are finished.

    Raises:
        DataError: there is none, or one is broken or about other images.
    """
    runs: dict[str, dict[str, Run]] = {}
    for row, place in product(ROWS, sorted(folder.glob("seed-*"))):
        if any(place.glob(f"*/{row}/results.json")):
            seed = place.name.removeprefix("seed-")
            runs.setdefault(row, {})[seed] = Run(f"{row} of seed {seed}", read_runs([row], place, rule)[0].columns)
    if not runs:
        raise DataError(
            f"{folder} has no finished evaluation seed-*/<benchmark>/<row>; rows are {', '.join(ROWS)}. "
            "`make ablation` trains and evaluates them all."
        )
    ablation = Ablation(rule, runs)
    if not ablation.questions:
        raise DataError(f"{folder}: no question was answered by all rows, or none belongs to {', '.join(COLUMNS)}.")
    return ablation
