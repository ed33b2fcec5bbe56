"""Units, the smallest things that a batch is made of, and how many of each data set an epoch takes.

A *unit* is one image with up to `rows_per_image` of its rows, or one text-only row. A *pass* over a data set is a
shuffle of all its units; an epoch of a mixture takes the next part of the current pass, and begins another one where
it ends. So nothing is dropped or doubled within a pass, whatever its share of an epoch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cobra.config.train import DataSetConfig

Unit = tuple[int, ...]

IMAGE_PAD: Unit = (-1,)  # a blank image and one token without label
TEXT_PAD: Unit = (-2,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What a plan has to know of one data set of a mixture.

    Attributes:
        first_row: number of its first row in the mixture; its rows follow each other.
        images: int32 [rows], rows with the same number >= 0 share an image; -1 for text.
        lengths: int32 [rows], text tokens.
        epochs: passes over it in one epoch of the mixture.
    """

    first_row: int
    images: np.ndarray
    lengths: np.ndarray
    epochs: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Many units of one modality.

    Attributes:
        rows: int32, the rows of all units, one unit after the other.
        starts: int64 [units], where each unit begins in `rows`.
        sizes: int32 [units], rows of each unit.
        longest: int32 [units], text tokens of each unit's longest row.
    """

    rows: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    longest: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, unit: int) -> Unit:
        start = self.starts[unit]
        return tuple(self.rows[start : start + self.sizes[unit]].tolist())

    def cost(self, image_tokens: int) -> np.ndarray:
        """Tokens that each unit brings to a batch, with the padding inside of it: int64 [units]."""
        return image_tokens + self.sizes.astype(np.int64) * self.longest

    def take(self, order: np.ndarray) -> Units:
        """Return the units of these numbers; the rows stay where they are."""
        return Units(rows=self.rows, starts=self.starts[order], sizes=self.sizes[order], longest=self.longest[order])

    @staticmethod
    def join(parts: Sequence[Units]) -> Units:
        """Return all units of several collections, in their order."""
        offsets = np.cumsum([0, *(len(part.rows) for part in parts)])
        return Units(
            rows=np.concatenate([part.rows for part in parts]),
            starts=np.concatenate([part.starts + offset for part, offset in zip(parts, offsets[:-1], strict=True)]),
            sizes=np.concatenate([part.sizes for part in parts]),
            longest=np.concatenate([part.longest for part in parts]),
        )


def epochs_of(sets: Sequence[DataSetConfig], num_rows: Sequence[int]) -> list[float]:
    """Return the passes over each data set in one epoch of their mixture.

    Weights share out as many rows as all data sets have together.
    """
    weights = [0.0 if part.weight is None else part.weight for part in sets]
    if any(weights):
        total = sum(num_rows) / sum(weights)
        return [weight * total / rows for weight, rows in zip(weights, num_rows, strict=True)]
    return [1.0 if part.epochs is None else part.epochs for part in sets]


class Stream:
    """The units of one modality of one data set, pass after pass without end."""

    def __init__(self, part: Part, *, with_image: bool, rows_per_image: int, seed: Sequence[int]) -> None:
        """Take the data set, the modality, rows per unit at most, and the seed of the passes."""
        chosen = np.flatnonzero((part.images >= 0) == with_image).astype(np.int32)
        self._seed, self._epochs, self._rows_per_image = [*seed, int(with_image)], part.epochs, rows_per_image
        self._first_row, self._lengths, self._with_image = part.first_row, part.lengths, with_image
        # The rows of an image side by side, and images in order of their numbers.
        self._rows = chosen[np.argsort(part.images[chosen], kind="stable")] if with_image else chosen
        self._images = part.images[self._rows] if with_image else np.arange(len(chosen), dtype=np.int32)
        starts = np.flatnonzero(np.diff(self._images, prepend=-1))
        self._group_sizes = np.diff(starts, append=len(self._rows))
        self._group_starts = starts
        self._parts = -(-self._group_sizes // rows_per_image)  # units of each image
        self.units_per_pass = int(self._parts.sum())
        self.one_pass = lru_cache(maxsize=1)(self._one_pass)

    def bounds(self, epoch: int) -> tuple[int, int]:
        """Return the first unit of an epoch and the one behind its last, counted from the first pass on."""
        low, high = (round(count * self._epochs * self.units_per_pass) for count in (epoch, epoch + 1))
        return low, high

    def most_costly(self, image_tokens: int) -> int:
        """Return the cost that no unit of any pass exceeds: image tokens, and rows times the longest of them."""
        if not len(self._rows):
            return 0
        longest = np.maximum.reduceat(self._lengths[self._rows], self._group_starts)
        rows = np.minimum(self._group_sizes, self._rows_per_image)
        return int((longest.astype(np.int64) * rows).max()) + image_tokens * self._with_image

    def epoch(self, epoch: int) -> list[Units]:
        """Return the units of an epoch, a collection for every pass that it takes part in."""
        position, end = self.bounds(epoch)
        found: list[Units] = []
        while position < end:
            number, offset = divmod(position, self.units_per_pass)
            count = min(end - position, self.units_per_pass - offset)
            units, order = self.one_pass(number)
            found.append(units.take(order[offset : offset + count]))
            position += count
        return found

    def _one_pass(self, number: int) -> tuple[Units, np.ndarray]:
        """Return the units of a pass and their order; the rows of an image are split anew in every pass."""
        rng = np.random.default_rng([*self._seed, number])
        rows = self._rows
        if self.units_per_pass < len(rows):
            rows = rows[np.lexsort((rng.random(len(rows), np.float32), self._images))]
        # An image of n rows in m parts: n mod m parts get one row more than the others.
        group = np.repeat(np.arange(len(self._parts)), self._parts)
        part = np.arange(len(group)) - np.repeat(np.cumsum(self._parts) - self._parts, self._parts)
        small, more = np.divmod(self._group_sizes, self._parts)
        sizes = (small[group] + (part < more[group])).astype(np.int32)
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        longest = np.maximum.reduceat(self._lengths[rows], starts).astype(np.int32)
        units = Units(rows=rows + np.int32(self._first_row), starts=starts, sizes=sizes, longest=longest)
        return units, rng.permutation(len(sizes))
