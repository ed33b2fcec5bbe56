"""Which examples a step sees: a pure function of (seed, epoch, step), so any step can be resumed at.

A *unit* is one image with up to `rows_per_image` of its rows, or one text-only row. A global batch is `batch_size`
units, all of them images or all of them text; the last batch of each modality in an epoch may be smaller. Every row is
seen exactly once per epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Unit = tuple[int, ...]


class UnitSampler:
    """Plans the batches of every epoch."""

    def __init__(self, images: Sequence[str | None], *, batch_size: int, rows_per_image: int, seed: int) -> None:
        """Take the image of every row (None for text), units per batch, rows per unit at most, and the seed."""
        self.batch_size, self.rows_per_image, self.seed = batch_size, rows_per_image, seed
        groups: dict[str, list[int]] = {}
        self._text: list[int] = []
        for row, image in enumerate(images):
            if image is None:
                self._text.append(row)
            else:
                groups.setdefault(image, []).append(row)
        self._groups = [np.array(rows) for rows in groups.values()]
        num_units = sum(-(-len(rows) // rows_per_image) for rows in self._groups)
        self.batches_per_epoch = -(-num_units // batch_size) + -(-len(self._text) // batch_size)

    def epoch(self, epoch: int) -> list[list[Unit]]:
        """Return all batches of an epoch in the order in which they are trained on."""
        rng = np.random.default_rng([self.seed, epoch])
        with_image: list[Unit] = []
        for rows in self._groups:
            parts = np.array_split(rng.permutation(rows), -(-len(rows) // self.rows_per_image))
            with_image += [tuple(part.tolist()) for part in parts]
        text: list[Unit] = [(row,) for row in self._text]
        batches = self._cut(with_image, rng) + self._cut(text, rng)
        return [batches[i] for i in rng.permutation(len(batches))]

    def batches(self, *, first_step: int, num_steps: int) -> Iterator[list[Unit]]:
        """Yield the batches of steps `first_step` .. `num_steps` - 1, running on from epoch to epoch."""
        step = first_step
        while step < num_steps:
            epoch, offset = divmod(step, self.batches_per_epoch)
            for batch in self.epoch(epoch)[offset : offset + num_steps - step]:
                yield batch
                step += 1

    def _cut(self, units: list[Unit], rng: np.random.Generator) -> list[list[Unit]]:
        shuffled = [units[i] for i in rng.permutation(len(units))]
        return [shuffled[i : i + self.batch_size] for i in range(0, len(shuffled), self.batch_size)]
