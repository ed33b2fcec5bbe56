"""The loader: the same batches from any start with any workers; bad images stop the run or are left out and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import TRANSFORM, make_folder, open_folder
from PIL import Image

from cobra.config import TrainConfig
from cobra.config.train import DataConfig
from cobra.data.batch import Batch
from cobra.data.dataset import ConversationDataset, open_data
from cobra.data.loader import iterate
from cobra.data.sampler import BatchPlan
from cobra.data.units import Unit
from cobra.errors import DataError
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

NUM_STEPS = 10  # reaches into a second epoch


@pytest.fixture
def dataset(small_data: Any, tokenizer: Tokenizer, tmp_path: Path) -> ConversationDataset:
    config = DataConfig(
        name="small", annotations=str(small_data.annotations), images=str(small_data.images), index=str(tmp_path)
    )
    return open_data(config, tokenizer, prompt_format("mamba"), TRANSFORM, max_length=64, captions_only=False)


def make_plan(dataset: ConversationDataset, **train: Any) -> BatchPlan:
    settings: dict[str, Any] = {"global_batch_size": 8, "per_device_batch_size": 4, "epochs": 1} | train
    config = TrainConfig(stage="finetune", learning_rate=1.0, **settings)
    return BatchPlan(dataset.parts, config, rows_per_image=2, seed=0, image_tokens=4)


def load(dataset: ConversationDataset, **options: Any) -> list[list[Batch]]:
    return list(iterate(dataset, make_plan(dataset), **{"first_step": 0, "num_steps": NUM_STEPS} | options))


def assert_same(actual: list[list[Batch]], expected: list[list[Batch]]) -> None:
    assert len(actual) == len(expected)
    for step, other in zip(actual, expected, strict=True):
        for batch, same in zip(step, other, strict=True):
            for name, value in vars(batch).items():
                if name in ("ids", "bad"):
                    assert value == getattr(same, name)
                else:
                    torch.testing.assert_close(value, getattr(same, name), rtol=0, atol=0)


def test_steps_are_lists_of_micro_batches(dataset: ConversationDataset) -> None:
    plan = make_plan(dataset)
    assert plan.batches_per_epoch(0) == 7
    steps = load(dataset)
    assert len(steps) == NUM_STEPS
    for number, batches in enumerate(steps):
        sizes = [len(b.pixels[0] if b.pixels else b.lengths) for b in batches]
        assert sizes in ([4, 4], [4, 2])  # 6 text rows
        ids = sorted(row_id for batch in batches for row_id in batch.ids)
        assert ids == sorted(dataset.row(row)[1].id for unit in plan.batch(number) for row in unit)


def test_ranks_share_out_every_step(dataset: ConversationDataset) -> None:
    ranks = [load(dataset, rank=rank, world_size=2) for rank in range(2)]
    for steps in zip(*ranks, load(dataset), strict=True):
        *parts, whole = [sorted(row_id for batch in batches for row_id in batch.ids) for batches in steps]
        assert sorted(parts[0] + parts[1]) == whole
        for first, second in zip(*steps[:2], strict=True):
            assert (first.pixels is None) == (second.pixels is None)
    labels = [
        sum(batch.num_labels for steps in rank for step in steps for batch in step) for rank in (ranks, [load(dataset)])
    ]
    assert labels[0] == labels[1]


def test_any_start_gives_the_same_steps(dataset: ConversationDataset) -> None:
    assert_same(load(dataset, first_step=6), load(dataset)[6:])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(dataset: ConversationDataset, num_workers: int) -> None:
    assert_same(load(dataset, num_workers=num_workers), load(dataset))


def test_pixels_belong_to_their_rows(dataset: ConversationDataset, small_data: Any) -> None:
    names = {tuple(TRANSFORM(Image.open(small_data.image(n)))[0].flatten().tolist()): f"{n}/" for n in range(24)}
    for batch in (batch for step in load(dataset) for batch in step if batch.pixels is not None):
        index = torch.arange(len(batch.lengths)) if batch.image_index is None else batch.image_index
        for row_id, i in zip(batch.ids, index, strict=True):
            assert row_id.startswith(names[tuple(batch.pixels[0][i].flatten().tolist())])


class Fixed:
    """A plan of one step."""

    def __init__(self, *micro_batches: list[Unit]) -> None:
        self.micro_batches = list(micro_batches)

    def step(self, step: int, rank: int, world_size: int) -> list[list[Unit]]:
        return self.micro_batches


class TestBadImages:
    @pytest.fixture
    def broken(self, tmp_path: Path, tokenizer: Tokenizer) -> ConversationDataset:
        """Rows 1 and 3 share an image that vanishes after the data has been checked, row 4's does not decode."""
        make_folder(tmp_path)
        dataset = open_folder(tmp_path, tokenizer)
        (tmp_path / "images" / "1.png").unlink()
        (tmp_path / "images" / "sub" / "2.png").write_bytes(b"no image")
        return dataset

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_error_is_one_line(self, broken: ConversationDataset, num_workers: int) -> None:
        plan = Fixed([(0,)], [(1, 3)])
        with pytest.raises(DataError, match=r"^Cannot read the image .*1\.png: No such file or directory\.$"):
            list(iterate(broken, plan, first_step=0, num_steps=1, num_workers=num_workers))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_skip_leaves_out_the_unit_and_tells(self, broken: ConversationDataset, num_workers: int) -> None:
        plan = Fixed([(0,), (1, 3)], [(4,), (1,)], [(2,)])
        options: dict[str, Any] = {"num_workers": num_workers, "on_bad_example": "skip"}
        ((first, empty, text),) = iterate(broken, plan, first_step=0, num_steps=1, **options)
        assert first.ids == ("0",) and first.num_pads == 0
        assert [(bad.id, bad.data_set) for bad in first.bad] == [("1", "five"), ("3", "five")]
        assert "1.png: No such file" in first.bad[0].reason
        assert empty.ids == () and empty.num_pads == 1 and empty.num_labels == 0
        assert [bad.id for bad in empty.bad] == ["4", "1"] and "does not decode" in empty.bad[0].reason
        assert empty.pixels is not None and empty.pixels[0].shape == (1, 3, 16, 16)
        assert text.ids == ("2",) and not text.bad


def test_plan_of_whole_epochs_loads_every_row(dataset: ConversationDataset) -> None:
    plan = make_plan(dataset, epochs=2)
    seen = [
        row_id
        for step in iterate(dataset, plan, first_step=0, num_steps=plan.num_steps)
        for b in step
        for row_id in b.ids
    ]
    names, counts = np.unique(seen, return_counts=True)
    assert len(names) == dataset.num_rows and set(counts.tolist()) == {2}
