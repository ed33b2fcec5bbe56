"""Yes/no answers: counts of right and wrong, and areas under two curves. Numbers are in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def confusion(predicted: Sequence[bool], true: Sequence[bool]) -> dict[str, float | None]:
    """Return precision, recall, F1 (0 where nothing was found) and the share of yes, as POPE's evaluate.py defines."""
    found, real = np.asarray(predicted, dtype=bool), np.asarray(true, dtype=bool)
    hits = int((found & real).sum())
    precision, recall = _ratio(hits, int(found.sum())), _ratio(hits, int(real.sum()))
    return {
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": 100 * _ratio(int(found.sum()), len(found)),
    }


def areas(scores: Sequence[float], true: Sequence[bool]) -> dict[str, float | None]:
    """Return the ROC AUC and the PR AUC (average precision); None where only one class is there."""
    return {"roc_auc": roc_auc(scores, true), "pr_auc": average_precision(scores, true)}


def roc_auc(scores: Sequence[float], true: Sequence[bool]) -> float | None:
    """Return the chance that a true row has a higher score than a false one; ties count half."""
    hits, misses = _steps(scores, true)
    if not hits.sum() or not misses.sum():
        return None
    above = np.cumsum(hits) - hits / 2  # true rows ahead of each group of equal scores, half of those inside it
    return 100 * float((misses * above).sum() / (hits.sum() * misses.sum()))


def average_precision(scores: Sequence[float], true: Sequence[bool]) -> float | None:
    """Return the precision at each distinct score, weighted by the recall that it adds (no interpolation)."""
    hits, misses = _steps(scores, true)
    if not hits.sum():
        return None
    precision = np.cumsum(hits) / np.cumsum(hits + misses)
    return 100 * float((hits * precision).sum() / hits.sum())


def _steps(scores: Sequence[float], true: Sequence[bool]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count true and false rows at each distinct score, highest first."""
    values, group = np.unique(-np.asarray(scores, dtype=np.float64), return_inverse=True)
    real = np.asarray(true, dtype=np.float64)
    hits, misses = np.bincount(group, real, len(values)), np.bincount(group, 1 - real, len(values))
    return hits.astype(np.float64), misses.astype(np.float64)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def says(probabilities: Mapping[str, float], positive: str, negative: str) -> bool:
    """Tell whether the positive word is the likelier one; a tie counts as positive (argmax takes the first)."""
    return probabilities[positive] >= probabilities[negative]


def share(probabilities: Mapping[str, float], positive: str, negative: str) -> float:
    """Return the probability of the positive word among the two."""
    total = probabilities[positive] + probabilities[negative]
    is_rounding = abs(total - 1) < 1e-6  # numbers that sum to 1 stay as they are, so that ties stay ties
    return probabilities[positive] if is_rounding else probabilities[positive] / total
