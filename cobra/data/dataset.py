"""Indexes and images -> examples: the data sets of a mixture as one."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cobra.config import DataConfig
from cobra.data.batch import Example
from cobra.data.conversations import Row
from cobra.data.health import how_to_get, usable_rows
from cobra.data.index import Index, open_index
from cobra.data.lengths import text_lengths
from cobra.data.makers import make_if_missing
from cobra.data.units import IMAGE_PAD, TEXT_PAD, Part, Unit, epochs_of
from cobra.errors import DataError
from cobra.hub import open_image
from cobra.text.prompt import IGNORE_INDEX, PromptFormat
from cobra.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Transform = Callable[[Image.Image], list[Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """One data set of a mixture.

    Attributes:
        name: its name in the config.
        index: its rows.
        images: folder that the rows' image paths start from.
        lengths: int32 [rows of the index], text tokens.
        used: int32, the rows of the index that are trained on; None: all.
    """

    name: str
    index: Index
    images: Path
    lengths: np.ndarray
    used: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index) if self.used is None else len(self.used)

    @property
    def digest(self) -> str:
        """Fingerprint of the rows that are used."""
        if self.used is None:
            return self.index.digest
        return hashlib.sha256(self.index.digest.encode() + self.used.tobytes()).hexdigest()[:16]


class ConversationDataset:
    """Rows and images -> examples. Rows are numbered through all data sets; indexed by units of them."""

    def __init__(
        self,
        sets: Sequence[DataSet],
        tokenizer: Tokenizer,
        prompt: PromptFormat,
        transform: Transform,
        *,
        max_length: int | None = None,
        captions_only: bool = False,
        epochs: Sequence[float] | None = None,
    ) -> None:
        """Join rows, images and text tools.

        Args:
            sets: the data sets.
            tokenizer, prompt: text to ids.
            transform: image to pixels.
            max_length: text tokens of a row; longer rows are cut. None: no limit.
            captions_only: the align stage, which learns the first answer without its question.
            epochs: passes over each data set in one epoch of the mixture; None: one each.
        """
        self.sets = list(sets)
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.transform = transform
        self.max_length = max_length
        self.captions_only = captions_only
        self._epochs = [1.0] * len(self.sets) if epochs is None else list(epochs)
        self._ends = list(accumulate(len(part) for part in sets))

    @property
    def num_rows(self) -> int:
        """Rows of all data sets."""
        return self._ends[-1]

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the rows: the same ids, text and image names in the same order."""
        digests = [part.digest for part in self.sets]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    @property
    def parts(self) -> list[Part]:
        """What a `BatchPlan` has to know of each data set."""
        everything = slice(None)
        return [
            Part(
                first_row=end - len(part),
                images=part.index.images[everything if part.used is None else part.used],
                lengths=part.lengths[everything if part.used is None else part.used],
                epochs=epochs,
            )
            for part, end, epochs in zip(self.sets, self._ends, self._epochs, strict=True)
        ]

    def row(self, number: int) -> tuple[DataSet, Row]:
        """Return a row with the data set that it is from."""
        which = bisect_right(self._ends, number)
        part = self.sets[which]
        number -= self._ends[which - 1] if which else 0
        return part, part.index.row(number if part.used is None else int(part.used[number]))

    def __getitem__(self, unit: Unit) -> Example:
        """Load the rows of one unit with the image that they share.

        Raises:
            DataError: the image is missing or does not decode.
        """
        if unit in (IMAGE_PAD, TEXT_PAD):
            pixels = self.transform(Image.new("RGB", (16, 16))) if unit == IMAGE_PAD else None
            return Example(pixels=pixels, rows=[([self.tokenizer.end_id], [IGNORE_INDEX])])
        rows = [self.row(number) for number in unit]
        part, first = rows[0]
        pixels = None if first.image is None else self.transform(open_image(part.images / first.image))
        return Example(
            pixels=pixels, rows=[self.tokenize(row) for _, row in rows], ids=tuple(row.id for _, row in rows)
        )

    def tokenize(self, row: Row) -> tuple[list[int], list[int]]:
        """Return a row's token ids and labels, turn by turn as the public weights were trained."""
        render = self.prompt.caption if self.captions_only else self.prompt.conversation
        ids: list[int] = []
        labels: list[int] = []
        for segment in render(row.turns):
            piece = self.tokenizer.encode(segment.text)
            ids += piece
            labels += piece if segment.is_answer else [IGNORE_INDEX] * len(piece)
        return ids[: self.max_length], labels[: self.max_length]


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    prompt: PromptFormat,
    transform: Transform,
    *,
    max_length: int,
    captions_only: bool,
) -> ConversationDataset:
    """Open the data of a run, making what can be made and checking all of it.

    Any number of processes may call this at once: on every machine one of them works and the others wait.

    Args:
        config: the data sets.
        tokenizer, prompt: text to ids.
        transform: image to pixels.
        max_length: text tokens of a row; longer rows are cut.
        captions_only: the align stage, which learns the first answer of rows with an image.

    Raises:
        DataError: files are missing or broken, or rows that are not to be skipped.
    """
    sets: list[DataSet] = []
    for name, part in config.sets.items():
        annotations, images = Path(part.annotations).expanduser(), Path(part.images).expanduser()
        make_if_missing(config.source, annotations)
        if not annotations.exists():
            raise DataError(f"There is no annotation file {annotations}. {how_to_get(config, 'data.annotations')}")
        index = open_index(annotations, name, Path(config.index))
        if captions_only:
            _check_no_text(index, annotations)
        lengths = text_lengths(index, name, tokenizer, prompt, max_length=max_length, captions_only=captions_only)
        used = usable_rows(index, name, images, lengths[1], config)
        sets.append(DataSet(name=name, index=index, images=images, lengths=lengths[0], used=used))
    epochs = epochs_of(list(config.sets.values()), [len(part) for part in sets])
    return ConversationDataset(
        sets, tokenizer, prompt, transform, max_length=max_length, captions_only=captions_only, epochs=epochs
    )


def _check_no_text(index: Index, annotations: Path) -> None:
    text = np.flatnonzero(index.images < 0)
    if len(text):
        raise DataError(
            f"{annotations}: row {index.row(int(text[0])).id!r} has no image, and train.stage=align learns from images "
            "alone; leave out the rows without image, or choose another stage."
        )
