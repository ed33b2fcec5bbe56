"""What the data side hands to the model: examples, and batches of them.

Shapes: I images, R rows, S text tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cobra.text.prompt import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with the rows of text that belong to it, or one row of text alone.

    Attributes:
        pixels: the image transform's views, uint8 [3, H, W] each; None for text.
        rows: token ids and labels of each row, of equal length; labels are `IGNORE_INDEX` outside of answers.
        ids: of the rows in the annotation file; none for a pad, which is there only so that a rank has work.
    """

    pixels: list[Tensor] | None
    rows: list[tuple[list[int], list[int]]]
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BadExample:
    """A row that was left out because its image is missing or does not decode."""

    id: str
    data_set: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: all image rows, or all text rows.

    Attributes:
        input_ids, labels: int64 [R, S], padded on the right.
        lengths: int64 [R], real tokens of each row.
        pixels: views, uint8 [I, 3, H, W] each; None for text.
        image_index: int64 [R], the image of each row; None for text, and where row r has image r.
        num_labels: labelled tokens that carry loss, counted on the host.
        ids: of the rows in the annotation file, without the pads.
        bad: the rows that were left out.
        num_pads: images or text rows without a label, added only so that a rank has something to run.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    pixels: list[Tensor] | None
    image_index: Tensor | None
    num_labels: int
    ids: tuple[str, ...] = ()
    bad: tuple[BadExample, ...] = ()
    num_pads: int = 0

    def indexed(self) -> Batch:
        """Name the image of each row also where row r has image r; a batch of text stays as it is."""
        if self.pixels is None or self.image_index is not None:
            return self
        return replace(self, image_index=torch.arange(len(self.input_ids)))

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            lengths=self.lengths.to(device),
            pixels=None if self.pixels is None else [view.to(device) for view in self.pixels],
            image_index=None if self.image_index is None else self.image_index.to(device),
        )


def collate(examples: Sequence[Example], pad_id: int, bad: Sequence[BadExample] = ()) -> Batch:
    """Join examples of one modality: pad on the right, remember which image each row belongs to.

    Every position but the answers' is labelled `IGNORE_INDEX`. Image positions are not part of `labels` at all: the
    model puts the image in front of the text and looks for labels among the text only.
    """
    with_image = [example.pixels is not None for example in examples]
    if any(with_image) != all(with_image):
        raise ValueError("A batch must be all images or all text; the sampler promises it.")
    rows = [row for example in examples for row in example.rows]
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    input_ids = torch.full((len(rows), int(lengths.max())), pad_id)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for r, (ids, wanted) in enumerate(rows):
        input_ids[r, : len(ids)] = torch.tensor(ids)
        labels[r, : len(wanted)] = torch.tensor(wanted)
    pixels, image_index = None, None
    if all(with_image):
        views = zip(*(example.pixels or [] for example in examples), strict=True)
        pixels = [torch.stack(view) for view in views]
        counts = torch.tensor([len(example.rows) for example in examples])
        if len(rows) > len(examples):
            image_index = torch.repeat_interleave(torch.arange(len(examples)), counts)
    counted = labels if pixels is not None else labels[:, 1:]  # nothing stands before a text row's first token
    return Batch(
        input_ids=input_ids,
        labels=labels,
        lengths=lengths,
        pixels=pixels,
        image_index=image_index,
        num_labels=int((counted != IGNORE_INDEX).sum()),
        ids=tuple(row_id for example in examples for row_id in example.ids),
        bad=tuple(bad),
        num_pads=sum(not example.ids for example in examples),
    )
