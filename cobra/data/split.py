"""A global batch -> the micro-batches of every rank, balanced: each rank gets as many of them, of like cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cobra.config import TrainConfig
from cobra.data.units import Units
from cobra.errors import ConfigError


def check_world_size(train: TrainConfig, world_size: int) -> None:
    """Check that every rank gets whole micro-batches.

    Raises:
        ConfigError: the global batch size is no multiple of what all ranks process at once.
    """
    if train.global_batch_tokens is not None:
        return
    size, at_once = train.global_batch_size, train.per_device_batch_size * world_size
    if size % at_once:
        lower, upper = size // at_once * at_once, (size // at_once + 1) * at_once
        usable = f"{lower} or {upper}" if lower else str(upper)
        raise ConfigError(
            f"train.global_batch_size={size} is not divisible by per_device_batch_size={train.per_device_batch_size} "
            f"x world_size={world_size}; use {usable}."
        )


def split(units: Units, image_tokens: int, train: TrainConfig, world_size: int) -> list[list[list[int]]]:
    """Share out a global batch.

    Costly units go first, in rounds of one micro-batch per rank; within a round they are dealt to the ranks back and
    forth, so that no rank waits long for another one. A rank that gets nothing in the last round has an empty list.

    Args:
        units: of one global batch.
        image_tokens: tokens of an image; 0 for text.
        train: sizes or token budgets.
        world_size: number of ranks.

    Returns:
        Rounds of ranks of numbers of units.
    """
    order = np.argsort(-units.cost(image_tokens), kind="stable")
    rounds: list[list[list[int]]] = []
    for count in _rounds(units, order, image_tokens, train, world_size):
        dealt: list[list[int]] = [[] for _ in range(world_size)]
        for i, unit in enumerate(order[:count].tolist()):
            dealt[_rank(i, len(rounds), world_size)].append(unit)
        rounds.append(dealt)
        order = order[count:]
    return rounds


def _rank(i: int, number: int, world_size: int) -> int:
    """The rank that gets the i-th unit of a round; the next round begins at the other end."""
    turn, rank = divmod(i, world_size)
    return rank if (turn + number) % 2 == 0 else world_size - 1 - rank


def _rounds(units: Units, order: np.ndarray, image_tokens: int, train: TrainConfig, world_size: int) -> Iterator[int]:
    """Yield the number of units of each round."""
    left = len(order)
    if train.per_device_batch_tokens is None:
        while left > 0:
            yield min(left, train.per_device_batch_size * world_size)
            left -= train.per_device_batch_size * world_size
        return
    sizes, longest = units.sizes[order].tolist(), units.longest[order].tolist()
    start, number = 0, 0
    while start < left:
        loads = [_Load() for _ in range(world_size)]
        count = 0
        while start + count < left:
            load = loads[_rank(count, number, world_size)]
            if not load.add(sizes[start + count], longest[start + count], image_tokens, train.per_device_batch_tokens):
                break
            count += 1
        yield count
        start, number = start + count, number + 1


@dataclass
class _Load:
    """A micro-batch in the making."""

    images: int = 0
    rows: int = 0
    longest: int = 0

    def add(self, rows: int, longest: int, image_tokens: int, budget: int) -> bool:
        """Take a unit, unless the padded micro-batch would exceed the budget. The first one always fits."""
        images, total, longest = self.images + 1, self.rows + rows, max(self.longest, longest)
        if self.images and images * image_tokens + total * longest > budget:
            return False
        self.images, self.rows, self.longest = images, total, longest
        return True
