"""How sure a number is. Images are drawn, not questions: questions about one image go together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

_DRAWS, _SEED = 1000, 0
_TIMES = 20  # so often each draw is taken with other seeds
_FLIPS = 10_000
_EXACT = 12  # so many images or fewer: all 2^n signs are tried
_CELLS = 4_000_000  # signs that are held at once


def interval(scores: Sequence[float], images: Sequence[Hashable], parts: Sequence[Hashable]) -> tuple[float, float]:
    """Return the central 95 % of the accuracy in percent over redrawn sets of images; always the same draws.

    Args:
        scores: of each question, from 0 to 1.
        images: the image of each question.
        parts: where they differ, the accuracy is the mean of the parts' accuracies.
    """
    return central_95(100 * np.nanmean(redrawn([scores], images, parts)[:, 0], axis=1))


def redrawn(
    models: Sequence[Sequence[float]], images: Sequence[Hashable], parts: Sequence[Hashable]
) -> NDArray[np.float64]:
    """Return accuracies on redrawn sets of images, always the same draws: (draws, models, parts).

    Args:
        models: each one's scores of the same questions, from 0 to 1.
        images: the image of each question.
        parts: of each question; in the order in which they first appear. A part that was not drawn is NaN.
    """
    image, part = _numbers(images), _numbers(parts)
    num_images, num_parts = int(image.max()) + 1, int(part.max()) + 1
    counts, sums = np.zeros((num_images, num_parts)), np.zeros((num_images, len(models), num_parts))
    np.add.at(counts, (image, part), 1)
    for model, scores in enumerate(models):
        np.add.at(sums[:, model], (image, part), np.asarray(scores, dtype=np.float64))
    rng = np.random.default_rng(_SEED)
    means = np.full((_DRAWS, len(models), num_parts), np.nan)
    for i in range(_DRAWS):
        weights = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images).astype(np.float64)
        np.divide(np.tensordot(weights, sums, 1), total := weights @ counts, out=means[i], where=total > 0)
    return means


def with_seeds(means: NDArray[np.float64], variance: float, freedom: int) -> NDArray[np.float64]:
    """Return redrawn means to which the spread of other seeds is added, always the same draws.

    Drawing the seeds again, as images are, would say too little: of two or three there is not enough to draw. What a
    few seeds say of their spread is a t distribution.

    Args:
        means: over redrawn sets of images.
        variance: of the mean over seeds.
        freedom: degrees of freedom that the variance was estimated with.
    """
    noise = np.random.default_rng(_SEED + 1).standard_t(freedom, (_TIMES, len(means)))
    return (means + noise * np.sqrt(variance)).ravel()


def central_95(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return what 95 % of the values lie between."""
    low, high = np.nanpercentile(values, [2.5, 97.5]).tolist()
    return low, high


def sign_flip(differences: Sequence[float], images: Sequence[Hashable], parts: Sequence[Hashable]) -> float:
    """Return the two-sided p-value of a mean difference between two models' scores of the same questions.

    If the models were equally good, then on each image either could have had the other's answers. So the signs of all
    differences of an image are flipped together, at random (all ways where there are few), and p is the share of flips
    that give a mean at least as far from 0 as the one found. McNemar's test would need scores that are right or wrong,
    and questions that are independent of each other.

    Args:
        differences: of each question's scores, one model's minus the other's.
        images: the image of each question.
        parts: where they differ, the mean is that of the parts' means.
    """
    image, part = _numbers(images), _numbers(parts)
    weights = 1 / np.bincount(part)[part]
    shares = np.bincount(image, np.asarray(differences, dtype=np.float64) * weights)
    shares = shares[np.abs(shares) > 1e-12]  # others change nothing
    found, count = abs(shares.sum()) - 1e-9, len(shares)  # a mean that is as far up to rounding counts
    if count <= _EXACT:
        means = [abs(sum(signs)) for signs in product(*((share, -share) for share in shares.tolist()))]
        return sum(mean >= found for mean in means) / len(means)
    rng, extreme = np.random.default_rng(_SEED), 0
    rows = max(1, _CELLS // count)
    for start in range(0, _FLIPS, rows):
        signs = rng.integers(0, 2, (min(rows, _FLIPS - start), count), dtype=np.int8)
        extreme += int((np.abs(shares.sum() - 2 * (signs @ shares)) >= found).sum())
    return (extreme + 1) / (_FLIPS + 1)  # what was found is one of the ways


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many comparisons there are (Holm, 1979)."""
    count, adjusted, highest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _numbers(names: Sequence[Hashable]) -> NDArray[np.int64]:
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)
