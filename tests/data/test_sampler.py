"""Plans: every row once a pass, the same batches for any ranks, costs balanced, budgets kept, any step resumed at."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobra.config import TrainConfig
from cobra.config.train import DataSetConfig
from cobra.data.sampler import BatchPlan, check_world_size
from cobra.data.units import IMAGE_PAD, TEXT_PAD, Part, Unit, epochs_of
from cobra.errors import ConfigError, DataError

untimed = settings(deadline=None)  # others may have the cores

IMAGE_TOKENS = 7


def make_part(images: list[int | None], first_row: int = 0, epochs: float = 1.0, seed: int = 0) -> Part:
    """Rows of these images, None for text, with random lengths from 1 to 40 tokens."""
    numbers = np.array([-1 if image is None else image for image in images], np.int32)
    lengths = np.random.default_rng(seed).integers(1, 41, len(images)).astype(np.int32)
    return Part(first_row=first_row, images=numbers, lengths=lengths, epochs=epochs)


def make_plan(*parts: Part, rows_per_image: int = 2, seed: int = 0, **train: Any) -> BatchPlan:
    settings: dict[str, Any] = {"global_batch_size": 12, "per_device_batch_size": 2, "epochs": 1} | train
    config = TrainConfig(stage="finetune", learning_rate=1.0, **settings)
    return BatchPlan(parts, config, rows_per_image=rows_per_image, seed=seed, image_tokens=IMAGE_TOKENS)


def batches_of(plan: BatchPlan, epoch: int = 0) -> list[list[Unit]]:
    start = sum(plan.batches_per_epoch(e) for e in range(epoch))
    return [plan.batch(step) for step in range(start, start + plan.batches_per_epoch(epoch))]


def rows_of(batches: list[list[Unit]]) -> list[int]:
    return sorted(row for batch in batches for unit in batch for row in unit)


def padded(part: Part, units: list[Unit]) -> int:
    """Tokens of a batch with its padding."""
    rows = [row for unit in units for row in unit]
    images = len(units) if part.images[rows[0]] >= 0 else 0
    return images * IMAGE_TOKENS + len(rows) * int(part.lengths[rows].max())


def costs(part: Part, units: list[Unit]) -> int:
    """Tokens of a batch without the padding between units."""
    return sum(padded(part, [unit]) for unit in units)


images_of_rows = st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=1, max_size=60)
size_settings = st.fixed_dictionaries(
    {
        "global_batch_size": st.sampled_from([12, 24]),
        "per_device_batch_size": st.sampled_from([1, 2]),
        "rows_per_image": st.integers(1, 4),
        "group_by_length": st.booleans(),
        "seed": st.integers(0, 3),
    }
)
token_settings = st.fixed_dictionaries(
    {
        "per_device_batch_tokens": st.integers(167, 400),  # an image with four rows of 40 tokens fits
        "global_batch_tokens": st.integers(400, 1500),
        "rows_per_image": st.integers(1, 4),
        "group_by_length": st.booleans(),
    }
)
settings_of_plans = st.one_of(size_settings, token_settings)
worlds = st.sampled_from([1, 2, 3])


@untimed
@given(images=images_of_rows, settings=settings_of_plans, epoch=st.integers(0, 3))
def test_epoch_has_each_row_once(images: list[int | None], settings: dict[str, Any], epoch: int) -> None:
    batches = batches_of(make_plan(make_part(images), **settings), epoch)
    assert rows_of(batches) == list(range(len(images)))
    for batch in batches:
        assert len({images[row] is None for unit in batch for row in unit}) == 1  # all images or all text
        for unit in batch:
            assert len({images[row] for row in unit}) == 1 and len(unit) <= settings["rows_per_image"]
            assert images[unit[0]] is not None or len(unit) == 1


@untimed
@given(images=images_of_rows, settings=size_settings)
def test_only_the_last_batch_of_a_modality_is_short(images: list[int | None], settings: dict[str, Any]) -> None:
    batches = batches_of(make_plan(make_part(images), **settings))
    short = [images[b[0][0]] is None for b in batches if len(b) < settings["global_batch_size"]]
    assert len(short) == len(set(short))


@untimed
@given(images=images_of_rows, settings=settings_of_plans, world_size=worlds, step=st.integers(0, 8))
def test_ranks_share_out_the_global_batch(
    images: list[int | None], settings: dict[str, Any], world_size: int, step: int
) -> None:
    part = make_part(images)
    plan = make_plan(part, **settings)
    ranks = [plan.step(step, rank, world_size) for rank in range(world_size)]
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    pads = {IMAGE_PAD, TEXT_PAD}
    units = [unit for micro_batches in ranks for micro_batch in micro_batches for unit in micro_batch]
    assert sorted(unit for unit in units if unit not in pads) == sorted(plan.batch(step))
    for micro_batches in zip(*ranks, strict=True):
        found = {
            "text" if unit == TEXT_PAD or images[unit[0]] is None else "image"
            for units in micro_batches
            for unit in units
            if unit != IMAGE_PAD
        }
        assert len(found) == 1 and not (found == {"text"} and [IMAGE_PAD] in micro_batches)
        for micro_batch in micro_batches:
            if micro_batch[0] in pads:
                assert len(micro_batch) == 1
            elif "per_device_batch_tokens" in settings:
                assert padded(part, micro_batch) <= settings["per_device_batch_tokens"]
            else:
                assert len(micro_batch) <= settings["per_device_batch_size"]


@untimed
@given(images=images_of_rows, settings=token_settings)
def test_global_batches_keep_to_their_budget(images: list[int | None], settings: dict[str, Any]) -> None:
    part = make_part(images)
    batches = batches_of(make_plan(part, **settings))
    assert all(costs(part, batch) <= settings["global_batch_tokens"] for batch in batches)


def test_budgets_are_used_up() -> None:
    part = make_part([None] * 4000)
    plan = make_plan(part, global_batch_tokens=4000, per_device_batch_tokens=500)
    batches = batches_of(plan)
    assert np.median([costs(part, batch) for batch in batches]) > 0.95 * 4000
    micro_batches = [m for step in range(len(batches)) for m in plan.step(step, 0, 2)[:-1]]  # the last one is a rest
    assert np.median([padded(part, m) for m in micro_batches]) > 0.9 * 500


@untimed
@given(images=images_of_rows, settings=settings_of_plans, first=st.integers(0, 30))
def test_any_step_is_the_same_when_it_comes_first(
    images: list[int | None], settings: dict[str, Any], first: int
) -> None:
    part = make_part(images)
    plan = make_plan(part, **settings)
    seen = [plan.step(step, 0, 1) for step in range(first + 1)]
    assert make_plan(part, **settings).step(first, 0, 1) == seen[first]


@untimed
@given(images=images_of_rows, settings=size_settings)
def test_micro_batches_and_ranks_change_no_global_batch(images: list[int | None], settings: dict[str, Any]) -> None:
    part = make_part(images)
    plans = [make_plan(part, **settings | {"per_device_batch_size": size}) for size in (1, 3)]
    assert batches_of(plans[0]) == batches_of(plans[1])
    plans[0].step(0, 1, 2)
    assert batches_of(plans[0], epoch=1) == batches_of(plans[1], epoch=1)


@untimed
@given(images=images_of_rows, settings=settings_of_plans)
def test_costliest_batch_comes_first(images: list[int | None], settings: dict[str, Any]) -> None:
    part = make_part(images)
    found = [padded(part, batch) for batch in batches_of(make_plan(part, **settings))]
    assert found[0] == max(found)


def test_order_depends_on_seed_and_epoch() -> None:
    part = make_part([i // 3 for i in range(90)])
    plans = {(seed, epoch): batches_of(make_plan(part, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert batches_of(make_plan(part), 0) == plans[0, 0]
    assert len({str(plan) for plan in plans.values()}) == 4


def test_rows_of_an_image_are_split_evenly() -> None:
    (batch,) = batches_of(make_plan(make_part([0] * 7), rows_per_image=6))
    assert Counter(map(len, batch)) == {4: 1, 3: 1}  # not 6 and 1


def test_grouping_by_length_saves_padding() -> None:
    part = make_part([None] * 3000)
    share = {}
    for grouped in (True, False):
        batches = batches_of(make_plan(part, group_by_length=grouped, global_batch_size=24))
        share[grouped] = 1 - int(part.lengths.sum()) / sum(padded(part, batch) for batch in batches)
    assert share[True] < 0.05 < 0.4 < share[False]


@pytest.mark.parametrize("grouped", [True, False])
def test_ranks_get_like_costs(grouped: bool) -> None:
    part = make_part([i // 2 if i < 1600 else None for i in range(2400)])
    plan = make_plan(part, global_batch_size=64, per_device_batch_size=4, group_by_length=grouped)
    for step in range(plan.batches_per_epoch(0)):
        if len(plan.batch(step)) < 64:
            continue
        loads = [sum(costs(part, m) for m in plan.step(step, rank, 4)) for rank in range(4)]
        assert max(loads) <= 1.1 * min(loads)


def test_short_batch_is_spread_evenly_and_padded() -> None:
    plan = make_plan(make_part([None] * 5), global_batch_size=12, per_device_batch_size=2)
    sizes = [[len(m) for m in plan.step(0, rank, 3)] for rank in range(3)]
    assert sorted(size for (size,) in sizes) == [1, 2, 2]
    ranks = [make_plan(make_part([3]), global_batch_size=12).step(0, rank, 2) for rank in range(2)]
    assert sorted(ranks) == [[[IMAGE_PAD]], [[(0,)]]]


class TestMixtures:
    @untimed
    @given(
        shares=st.lists(st.sampled_from([0.25, 0.5, 1 / 3, 1.0, 1.5, 2.5]), min_size=1, max_size=3),
        images=st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=20, max_size=40),
    )
    def test_twelve_epochs_are_whole_passes(self, shares: list[float], images: list[int | None]) -> None:
        parts = [make_part(images, len(images) * i, share) for i, share in enumerate(shares)]
        plan = make_plan(*parts)
        counts = Counter(row for epoch in range(12) for row in rows_of(batches_of(plan, epoch)))
        for part, share in zip(parts, shares, strict=True):
            expected = round(12 * Fraction(share).limit_denominator(4))
            assert {counts[part.first_row + row] for row in range(len(images))} == {expected}

    @untimed
    @given(share=st.floats(0.1, 1), images=st.lists(st.integers(0, 6), min_size=20, max_size=40))
    def test_no_row_comes_twice_before_all_have_come(self, share: float, images: list[int | None]) -> None:
        plan = make_plan(make_part(images, epochs=share), rows_per_image=1)
        seen: Counter[int] = Counter()
        for epoch in range(int(1 / share)):
            seen.update(rows_of(batches_of(plan, epoch)))
        assert set(seen.values()) == {1}
        assert len(seen) == round(int(1 / share) * share * len(images))

    def test_shares_meet_in_every_batch(self) -> None:
        parts = [make_part([None] * 600, 0, 0.5), make_part([None] * 300, 600, 1.0)]
        batches = batches_of(make_plan(*parts, global_batch_size=60, group_by_length=False))
        for batch in batches:
            assert 15 < sum(unit[0] < 600 for unit in batch) < 45

    def test_weights_share_out_all_rows(self) -> None:
        sets = [DataSetConfig(annotations="", images="", weight=weight) for weight in (3.0, 1.0)]
        assert epochs_of(sets, [100, 300]) == [3.0, pytest.approx(1 / 3)]

    def test_epochs_are_one_by_default(self) -> None:
        sets = [DataSetConfig(annotations="", images="", epochs=epochs) for epochs in (None, 2.5)]
        assert epochs_of(sets, [5, 5]) == [1.0, 2.5]

    def test_images_of_two_sets_do_not_mix(self) -> None:
        parts = [make_part([0, 0], 0), make_part([0, 0], 2)]
        (batch,) = batches_of(make_plan(*parts))
        assert sorted(map(sorted, batch)) == [[0, 1], [2, 3]]


class TestNumberOfSteps:
    def test_epochs_may_be_fractions(self) -> None:
        part = make_part([None] * 100)
        assert make_plan(part, global_batch_size=10, per_device_batch_size=10, epochs=2.25).num_steps == 23

    def test_max_steps_wins(self) -> None:
        assert make_plan(make_part([None] * 100), epochs=2, max_steps=7).num_steps == 7

    def test_epochs_of_a_mixture_may_differ(self) -> None:
        plan = make_plan(make_part([None] * 37, epochs=0.5), global_batch_size=6, epochs=2)
        assert plan.num_steps == plan.batches_per_epoch(0) + plan.batches_per_epoch(1)
        assert rows_of([plan.batch(step) for step in range(plan.num_steps)]) == list(range(37))


class TestRefusals:
    def test_world_size_must_divide_the_batch(self) -> None:
        plan = make_plan(make_part([None]), global_batch_size=120, per_device_batch_size=12)
        message = (
            r"^train\.global_batch_size=120 is not divisible by per_device_batch_size=12 x world_size=8; "
            r"use 96 or 192\.$"
        )
        for use in (lambda: plan.step(0, 0, 8), lambda: check_world_size(plan.train, 8)):
            with pytest.raises(ConfigError, match=message):
                use()
        check_world_size(plan.train, 5)

    def test_only_larger_batches_are_named_where_smaller_ones_do_not_work(self) -> None:
        plan = make_plan(make_part([None]), global_batch_size=4, per_device_batch_size=4)
        with pytest.raises(ConfigError, match=r"use 12\.$"):
            check_world_size(plan.train, 3)

    def test_epoch_must_hold_an_example(self) -> None:
        with pytest.raises(DataError, match="holds no example"):
            make_plan(make_part([0, 0], epochs=0.1))

    def test_example_must_fit_into_the_budget(self) -> None:
        part = Part(first_row=0, images=np.zeros(3, np.int32), lengths=np.array([5, 90, 20], np.int32))
        with pytest.raises(ConfigError, match=r"per_device_batch_tokens=180 .* its rows, 187 tokens"):
            make_plan(part, per_device_batch_tokens=180, global_batch_tokens=1000)
        make_plan(part, per_device_batch_tokens=187, global_batch_tokens=1000)
