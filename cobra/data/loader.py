"""Dataset + sampler + collate -> an iterator over global batches that can start at any step."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from cobra.data.batch import Batch, Example, collate
from cobra.data.conversations import ConversationDataset
from cobra.data.sampler import Unit, UnitSampler
from cobra.errors import DataError


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the trainer stops the workers once its step is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Guarded:
    """A dataset that returns its DataErrors: raised in a worker, they would come back as a page of traceback."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, unit: Unit) -> Example | DataError:
        try:
            return self.dataset[unit]
        except DataError as error:
            return error


class _Collate:
    """Cuts a global batch into micro-batches; a class, so that worker processes can receive it."""

    def __init__(self, pad_id: int, micro_batch_size: int) -> None:
        self.pad_id, self.micro_batch_size = pad_id, micro_batch_size

    def __call__(self, examples: list[Example | DataError]) -> list[Batch] | DataError:
        good: list[Example] = []
        for example in examples:
            if isinstance(example, DataError):
                return example
            good.append(example)
        size = self.micro_batch_size
        return [collate(good[i : i + size], self.pad_id) for i in range(0, len(good), size)]


def iterate(
    dataset: ConversationDataset,
    sampler: UnitSampler,
    *,
    micro_batch_size: int,
    first_step: int,
    num_steps: int,
    num_workers: int = 0,
) -> Iterator[list[Batch]]:
    """Yield the global batch of every step from `first_step` on, as a list of micro-batches.

    The same steps give the same batches whatever `num_workers` and `first_step` are.

    Raises:
        DataError: an image is missing or does not decode, in whichever process.
    """
    loader: DataLoader[list[Batch] | DataError] = DataLoader(
        _Guarded(dataset),  # type: ignore[arg-type]
        batch_sampler=sampler.batches(first_step=first_step, num_steps=num_steps),  # type: ignore[arg-type]
        collate_fn=_Collate(dataset.tokenizer.end_id, micro_batch_size),
        num_workers=num_workers,
        generator=torch.Generator(),  # its own: a draw from the global one would make a resumed run differ
        worker_init_fn=_leave_interrupts_to_the_parent,
    )
    for batches in loader:
        if isinstance(batches, DataError):
            raise batches
        yield batches
