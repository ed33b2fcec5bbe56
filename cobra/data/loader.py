"""Dataset + plan + collate -> an iterator over the steps of one rank, which can start at any step."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from cobra.data.batch import BadExample, Batch, Example, collate
from cobra.data.dataset import ConversationDataset
from cobra.data.units import IMAGE_PAD, Unit
from cobra.errors import DataError


class Plan(Protocol):
    """What is needed of a `BatchPlan`."""

    def step(self, step: int, rank: int, world_size: int) -> list[list[Unit]]:
        """Return the micro-batches of one rank."""
        ...


def iterate(
    dataset: ConversationDataset,
    plan: Plan,
    *,
    first_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    on_bad_example: str = "error",
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of one rank, a list for every step from `first_step` to `num_steps` - 1.

    The same steps give the same batches whatever `num_workers` and `first_step` are. All ranks get as many
    micro-batches, each of the same modality.

    Args:
        dataset: rows and images.
        plan: which of them a step sees.
        first_step, num_steps: where to begin, and the steps of the whole run.
        rank, world_size: which share of each global batch.
        num_workers: processes that load micro-batches; 0: this one.
        on_bad_example: an image that is missing or does not decode by now is an "error", or its rows are left out
            ("skip") and stand in `Batch.bad`.

    Raises:
        DataError: an image is missing or does not decode, in whichever process.
    """
    sizes: deque[int] = deque()  # micro-batches of the steps that are under way

    def micro_batches() -> Iterator[list[Unit]]:
        for step in range(first_step, num_steps):
            planned = plan.step(step, rank, world_size)
            sizes.append(len(planned))
            yield from planned

    loader: DataLoader[Batch | DataError] = DataLoader(
        _Guarded(dataset),  # type: ignore[arg-type]
        batch_sampler=micro_batches(),  # type: ignore[arg-type]
        collate_fn=_Collate(dataset, skip=on_bad_example == "skip"),
        num_workers=num_workers,
        generator=torch.Generator(),  # its own: a draw from the global one would make a resumed run differ
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    batches: list[Batch] = []
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        batches.append(batch)
        if len(batches) == sizes[0]:
            sizes.popleft()
            yield batches
            batches = []


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    """Terminals and SLURM signal every process; the trainer stops the workers once its step is saved."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has the first two
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Guarded:
    """A dataset that returns its DataErrors: raised in a worker, they would come back as a page of traceback."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, unit: Unit) -> tuple[Unit, Example | DataError]:
        try:
            return unit, self.dataset[unit]
        except DataError as error:
            return unit, error


class _Collate:
    """Makes a batch of what could be loaded; a class, so that worker processes can receive it."""

    def __init__(self, dataset: ConversationDataset, *, skip: bool) -> None:
        self.dataset, self.skip = dataset, skip

    def __call__(self, loaded: list[tuple[Unit, Example | DataError]]) -> Batch | DataError:
        good: list[Example] = []
        bad: list[BadExample] = []
        for unit, example in loaded:
            if isinstance(example, Example):
                good.append(example)
            elif self.skip:
                rows = [self.dataset.row(number) for number in unit]
                bad += [BadExample(id=row.id, data_set=part.name, reason=str(example)) for part, row in rows]
            else:
                return example
        if not good:  # only images can be bad
            good = [self.dataset[IMAGE_PAD]]
        return collate(good, self.dataset.tokenizer.end_id, bad)
