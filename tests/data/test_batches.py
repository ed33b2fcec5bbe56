"""Collate, sampler and loader: right padding, every row once, the same batches from any start."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cobra.data import easyvqa
from cobra.data.batch import Batch, Example, collate
from cobra.data.conversations import ConversationDataset, read_rows
from cobra.data.loader import iterate
from cobra.data.sampler import UnitSampler
from cobra.errors import DataError
from cobra.models.image import ImageTransform
from cobra.text.prompt import IGNORE_INDEX, prompt_format
from cobra.text.tokenizer import Tokenizer

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


rows_of_images = st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), min_size=1, max_size=60)
settings_of_samplers = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 9), "rows_per_image": st.integers(1, 4), "seed": st.integers(0, 3)}
)


@given(images=rows_of_images, options=settings_of_samplers, epoch=st.integers(0, 3))
def test_sampler_sees_each_row_once_per_epoch(images: list[str | None], options: dict[str, int], epoch: int) -> None:
    sampler = UnitSampler(images, **options)
    batches = sampler.epoch(epoch)
    assert len(batches) == sampler.batches_per_epoch
    assert sorted(row for batch in batches for unit in batch for row in unit) == list(range(len(images)))
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for batch in batches:
        modality = {images[row] is not None for unit in batch for row in unit}
        assert len(modality) == 1  # all images or all text
        sizes[modality.pop()].append(len(batch))
        for unit in batch:
            assert len({images[row] for row in unit}) == 1 and len(unit) <= options["rows_per_image"]
            assert images[unit[0]] is not None or len(unit) == 1
    for lengths in sizes.values():  # at most one short batch of each modality
        assert sum(length < options["batch_size"] for length in lengths) <= 1


@given(images=rows_of_images, options=settings_of_samplers, data=st.data())
def test_sampler_resumes_at_any_step(images: list[str | None], options: dict[str, int], data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(0, 40))
    first = data.draw(st.integers(0, num_steps))
    plan = list(UnitSampler(images, **options).batches(first_step=0, num_steps=num_steps))
    assert len(plan) == num_steps
    assert list(UnitSampler(images, **options).batches(first_step=first, num_steps=num_steps)) == plan[first:]


def test_sampler_shuffles_by_seed_and_epoch() -> None:
    images = [str(i // 3) for i in range(90)]

    def plan(seed: int, epoch: int) -> list[list[tuple[int, ...]]]:
        return UnitSampler(images, batch_size=8, rows_per_image=3, seed=seed).epoch(epoch)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(1, 0) and plan(0, 0) != plan(0, 1)
    assert plan(1, 0) != plan(0, 1)


def test_sampler_balances_the_rows_of_an_image() -> None:
    (batch,) = UnitSampler(["a"] * 7, batch_size=8, rows_per_image=6, seed=0).epoch(0)
    assert Counter(map(len, batch)) == {4: 1, 3: 1}  # not 6 and 1


class TestLoader:
    @pytest.fixture
    def dataset(self, small_data, tokenizer: Tokenizer) -> ConversationDataset:
        transform = ImageTransform([(16, {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"})], "resize-naive")
        rows = read_rows(small_data.annotations)
        return ConversationDataset(rows, small_data.images, tokenizer, prompt_format("mamba"), transform)

    @staticmethod
    def load(dataset: ConversationDataset, first_step: int = 0, num_workers: int = 0) -> list[list[Batch]]:
        images = [row.image for row in dataset.rows]
        sampler = UnitSampler(images, batch_size=8, rows_per_image=2, seed=0)
        assert sampler.batches_per_epoch == 7  # so that ten steps reach into a second epoch
        options = {"first_step": first_step, "num_steps": 10, "num_workers": num_workers}
        return list(iterate(dataset, sampler, micro_batch_size=3, **options))

    @staticmethod
    def assert_same(actual: list[list[Batch]], expected: list[list[Batch]]) -> None:
        assert len(actual) == len(expected)
        for step, other in zip(actual, expected, strict=True):
            for batch, same in zip(step, other, strict=True):
                for name, value in vars(batch).items():
                    torch.testing.assert_close(value, getattr(same, name), rtol=0, atol=0)

    def test_steps_are_cut_into_micro_batches(self, dataset: ConversationDataset) -> None:
        steps = self.load(dataset)
        assert len(steps) == 10
        for batches in steps:
            assert [len(b.pixels[0] if b.pixels else b.lengths) for b in batches] in ([3, 3, 2], [3, 3])  # 6 text rows
        for batch in (batch for step in steps for batch in step):
            assert (batch.pixels is None) == (batch.image_index is None)

    def test_any_start_gives_the_same_steps(self, dataset: ConversationDataset) -> None:
        self.assert_same(self.load(dataset, first_step=6), self.load(dataset)[6:])

    def test_workers_change_nothing(self, dataset: ConversationDataset) -> None:
        self.assert_same(self.load(dataset, num_workers=2), self.load(dataset))

    def test_pixels_belong_to_their_rows(self, dataset: ConversationDataset, small_data, tokenizer: Tokenizer) -> None:
        names = {
            tuple(dataset.transform(Image.open(small_data.image(n)))[0].flatten().tolist()): f"{n}.png"
            for n in range(24)
        }
        for batch in (batch for step in self.load(dataset) for batch in step if batch.pixels is not None):
            for ids, length, i in zip(batch.input_ids, batch.lengths, batch.image_index, strict=True):
                name = names[tuple(batch.pixels[0][i].flatten().tolist())]
                rows = [dataset[(r,)].rows[0][0] for r, row in enumerate(dataset.rows) if row.image == name]
                assert ids[:length].tolist() in rows


@pytest.fixture(scope="module")
def easyvqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("easy_vqa")
    from cobra.data.easyvqa import prepare

    folder = tmp_path_factory.mktemp("prepared") / "easyvqa"
    prepare(folder)
    return folder


@pytest.mark.parametrize(("split", "num_images", "num_rows"), [("train", 4000, 38575), ("test", 1000, 9673)])
def test_easyvqa_is_complete(easyvqa_folder: Path, split: str, num_images: int, num_rows: int) -> None:
    rows = read_rows(easyvqa_folder / f"{split}.json")
    assert len(rows) == num_rows
    assert len({row.id for row in rows}) == num_rows
    images = {row.image for row in rows}
    assert images == {f"{split}/{file.name}" for file in (easyvqa_folder / "images" / split).iterdir()}
    assert len(images) == num_images
    answers = {row.turns[0][1] for row in rows}
    assert {"Yes", "No", "circle"} < answers and not {"yes", "no"} & answers


def test_easyvqa_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is not empty and holds no easy-VQA"):
        easyvqa.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_easyvqa_is_made_once(easyvqa_folder: Path) -> None:
    from cobra.data.easyvqa import prepare

    before = (easyvqa_folder / "train.json").stat().st_mtime_ns
    prepare(easyvqa_folder)
    assert (easyvqa_folder / "train.json").stat().st_mtime_ns == before
