"""Confidence intervals by the bootstrap. Images are drawn, not questions: questions about one image go together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

_DRAWS, _SEED = 1000, 0


def interval(scores: Sequence[float], images: Sequence[Hashable], parts: Sequence[Hashable]) -> tuple[float, float]:
    """Return the central 95 % of the accuracy in percent over redrawn sets of images; always the same draws.

    Args:
        scores: of each question, from 0 to 1.
        images: the image of each question.
        parts: where they differ, the accuracy is the mean of the parts' accuracies.
    """
    image, part = _numbers(images), _numbers(parts)
    num_images, num_parts = int(image.max()) + 1, int(part.max()) + 1
    sums, counts = np.zeros((num_images, num_parts)), np.zeros((num_images, num_parts))
    np.add.at(sums, (image, part), np.asarray(scores, dtype=np.float64))
    np.add.at(counts, (image, part), 1)
    rng = np.random.default_rng(_SEED)
    means = np.empty(_DRAWS)
    for i in range(_DRAWS):
        weights = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        total = weights @ counts
        means[i] = np.mean((weights @ sums)[total > 0] / total[total > 0])
    low, high = np.percentile(100 * means, [2.5, 97.5]).tolist()
    return low, high


def _numbers(names: Sequence[Hashable]) -> NDArray[np.int64]:
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)
