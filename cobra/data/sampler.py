"""Which examples a step sees: a pure function of (seed, epoch, step), so any step can be resumed at.

A global batch is all images or all text. Every row of a data set is seen exactly once per pass over it, see
`cobra.data.units`; how a global batch is shared out among ranks is in `cobra.data.split`. The plan of an epoch knows
neither ranks nor micro-batches nor workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from cobra.config import TrainConfig
from cobra.data.split import check_world_size, split
from cobra.data.units import IMAGE_PAD, TEXT_PAD, Part, Stream, Unit, Units
from cobra.errors import ConfigError, DataError

_SORTED_TOGETHER = 50  # global batches whose units are sorted by cost: enough to save padding, and still a shuffle


@dataclass(frozen=True, kw_only=True, eq=False)
class _Epoch:
    """The global batches of an epoch in order. Batch i has the units `low[i]` .. `high[i]` - 1 of its modality."""

    units: tuple[Units, Units]  # text, images
    modality: np.ndarray  # index into `units`
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.low)


class BatchPlan:
    """Plans the batches of every epoch, and every rank's part of them."""

    def __init__(
        self, parts: Sequence[Part], train: TrainConfig, *, rows_per_image: int, seed: int, image_tokens: int
    ) -> None:
        """Plan batches of a mixture.

        Args:
            parts: the data sets.
            train: batch sizes or token budgets, and how long to train.
            rows_per_image: rows of an image that share one reading of it.
            seed: of the order.
            image_tokens: tokens that an image becomes.

        Raises:
            ConfigError: an example does not fit into the token budget of a micro-batch.
            DataError: there is no example.
        """
        self.train, self.seed, self.image_tokens = train, seed, image_tokens
        self._streams = [
            [
                Stream(part, with_image=with_image, rows_per_image=rows_per_image, seed=[seed, number])
                for number, part in enumerate(parts)
            ]
            for with_image in (False, True)
        ]
        self._epoch = lru_cache(maxsize=1)(self._plan)
        self._counts: dict[int, int] = {}
        self._check_budget()
        if not any(stream.bounds(0)[1] for streams in self._streams for stream in streams):
            raise DataError("One epoch of the data holds no example; raise data.mix: epochs, or add rows.")

    @cached_property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        fraction, whole = math.modf(self.train.epochs or 0)
        steps = sum(self.batches_per_epoch(epoch) for epoch in range(int(whole)))
        return steps + (math.ceil(fraction * self.batches_per_epoch(int(whole))) if fraction else 0)

    def batches_per_epoch(self, epoch: int) -> int:
        """Return the number of global batches of an epoch. It varies where data sets have fractional shares."""
        if epoch not in self._counts:
            if self.train.global_batch_tokens is None:
                bounds = [[stream.bounds(epoch) for stream in streams] for streams in self._streams]
                totals = [sum(high - low for low, high in of_modality) for of_modality in bounds]
                self._counts[epoch] = sum(-(-total // self.train.global_batch_size) for total in totals)
            else:
                self._counts[epoch] = len(self._epoch(epoch))
        return self._counts[epoch]

    def batch(self, step: int) -> list[Unit]:
        """Return the global batch of a step."""
        units, _ = self._batch(step)
        return [units[i] for i in range(len(units))]

    def step(self, step: int, rank: int, world_size: int) -> list[list[Unit]]:
        """Return the micro-batches of one rank; all ranks have as many of them, of one modality.

        Raises:
            ConfigError: the global batch size is no multiple of what all ranks process at once.
        """
        check_world_size(self.train, world_size)
        units, with_image = self._batch(step)
        pad = IMAGE_PAD if with_image else TEXT_PAD
        rounds = split(units, self.image_tokens if with_image else 0, self.train, world_size)
        return [[units[i] for i in dealt[rank]] or [pad] for dealt in rounds]

    def _batch(self, step: int) -> tuple[Units, bool]:
        """Return the units of a global batch, and whether they are images."""
        epoch = 0
        while step >= (count := self.batches_per_epoch(epoch)):
            step, epoch = step - count, epoch + 1
        plan = self._epoch(epoch)
        modality = int(plan.modality[step])
        chosen = np.arange(plan.low[step], plan.high[step])
        return plan.units[modality].take(chosen), bool(modality)

    def _plan(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self.seed, epoch])
        units: list[Units] = []
        modality, low, high, cost = [], [], [], []
        for number, streams in enumerate(self._streams):
            image_tokens = self.image_tokens * number
            found = _join([some for stream in streams for some in stream.epoch(epoch)])
            found, ends = self._cut(found.take(rng.permutation(len(found))), image_tokens)
            starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
            units.append(found)
            modality.append(np.full(len(ends), number))
            low.append(starts)
            high.append(ends)
            cost.append(_padded(found, starts, ends, image_tokens))
        costs = np.concatenate(cost)
        order = rng.permutation(len(costs))
        if epoch == 0:  # the costliest batch first: memory that does not suffice is noticed at once
            first = int(np.argmax(costs[order]))
            order = np.concatenate([order[first : first + 1], order[:first], order[first + 1 :]])
        modalities, lows, highs = (np.concatenate(arrays)[order] for arrays in (modality, low, high))
        return _Epoch(units=(units[0], units[1]), modality=modalities, low=lows, high=highs)

    def _cut(self, units: Units, image_tokens: int) -> tuple[Units, np.ndarray]:
        """Cut shuffled units into batches; return them in their new order, and where each batch ends."""
        budget, size = self.train.global_batch_tokens, self.train.global_batch_size
        cost = units.cost(image_tokens)
        if budget is None:
            together = np.arange(len(units)) // (_SORTED_TOGETHER * size)
        else:
            together = np.cumsum(cost) // (_SORTED_TOGETHER * budget)
        if self.train.group_by_length:
            # Falling, then rising costs: a batch across the border of two groups has like costs, too.
            order = np.lexsort((np.where(together % 2, cost, -cost), together))
            units, cost = units.take(order), cost[order]
        if budget is None:
            return units, np.minimum(np.arange(size, len(units) + size, size), len(units))
        totals, ends = np.cumsum(cost), [0]
        while ends[-1] < len(units):
            used = totals[ends[-1] - 1] if ends[-1] else 0
            ends.append(int(np.searchsorted(totals, used + budget, side="right")))
        return units, np.array(ends[1:], dtype=np.int64)

    def _check_budget(self) -> None:
        """Every unit has to fit into the budget of a micro-batch, as it cannot be split."""
        budget = self.train.per_device_batch_tokens
        needed = max(stream.most_costly(self.image_tokens) for streams in self._streams for stream in streams)
        if budget is not None and min(budget, self.train.global_batch_tokens or budget) < needed:
            raise ConfigError(
                f"train.per_device_batch_tokens={budget} and global_batch_tokens={self.train.global_batch_tokens} must "
                f"hold the costliest image with its rows, {needed} tokens; raise them, or lower data.rows_per_image or "
                "model.max_length."
            )


def _join(parts: list[Units]) -> Units:
    none = np.empty(0, np.int32)
    return Units.join([*parts, Units(rows=none, starts=none.astype(np.int64), sizes=none, longest=none)])


def _padded(units: Units, starts: np.ndarray, ends: np.ndarray, image_tokens: int) -> np.ndarray:
    """Tokens of each batch when all its rows are as long as its longest."""
    if not len(starts):
        return np.empty(0, np.int64)
    rows = np.add.reduceat(units.sizes.astype(np.int64), starts)
    return (ends - starts) * image_tokens + rows * np.maximum.reduceat(units.longest, starts)
