"""Collate: right padding, images remembered, pads counted."""

from __future__ import annotations

import pytest
import torch

from cobra.data.batch import Example, collate
from cobra.text.prompt import IGNORE_INDEX

X = IGNORE_INDEX


def picture(value: int) -> list[torch.Tensor]:
    return [torch.full((3, size, size), value, dtype=torch.uint8) for size in (4, 6)]


def test_collate_pads_on_the_right_and_remembers_images() -> None:
    batch = collate(
        [
            Example(pixels=picture(7), rows=[([1, 2, 3], [X, 2, 3]), ([4], [4])]),
            Example(pixels=picture(9), rows=[([5, 6], [X, 6])]),
        ],
        pad_id=99,
    )
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 99, 99], [5, 6, 99]]
    assert batch.labels.tolist() == [[X, 2, 3], [4, X, X], [X, 6, X]]
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.image_index is not None and batch.image_index.tolist() == [0, 0, 1]
    assert batch.pixels is not None and [tuple(view.shape) for view in batch.pixels] == [(2, 3, 4, 4), (2, 3, 6, 6)]
    assert [view[:, 0, 0, 0].tolist() for view in batch.pixels] == [[7, 9]] * 2
    assert batch.num_labels == 4


def test_collate_of_text_does_not_count_what_nothing_precedes() -> None:
    batch = collate([Example(pixels=None, rows=[([1, 2], [1, 2])]), Example(pixels=None, rows=[([3], [3])])], pad_id=0)
    assert batch.pixels is None and batch.image_index is None
    assert batch.num_labels == 1


def test_collate_refuses_a_mixed_batch() -> None:
    with pytest.raises(ValueError, match="all images or all text"):
        collate([Example(pixels=None, rows=[([1], [1])]), Example(pixels=picture(0), rows=[([1], [1])])], pad_id=0)


def test_collate_leaves_the_index_out_where_every_image_has_one_row() -> None:
    batch = collate([Example(pixels=picture(i), rows=[([1], [1])], ids=(str(i),)) for i in range(3)], pad_id=0)
    assert batch.image_index is None and batch.pixels is not None and len(batch.pixels[0]) == 3
    assert batch.ids == ("0", "1", "2") and batch.num_pads == 0


def test_collate_counts_pads() -> None:
    real, pad = Example(pixels=None, rows=[([1, 2], [X, 2])], ids=("a",)), Example(pixels=None, rows=[([0], [X])])
    batch = collate([real, pad, pad], pad_id=0)
    assert (batch.num_pads, batch.ids, batch.num_labels) == (2, ("a",), 1)
