"""Training on several ranks: the same numbers as on one, whatever is sharded, accumulated, saved or resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cobra.config import PretrainConfig
from cobra.train.run import pretrain
from cobra.train.trackers import read_metrics

STAGES = ("align", "finetune", "full-finetune")


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same_curve(run: Path, expected: Path) -> None:
    """Losses to 1e-6; gradient norms, sums over many numbers, to 1e-5."""
    assert len(rows(run)) == len(rows(expected)) > 0
    for row, wanted in zip(rows(run), rows(expected), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6), row["step"]
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5), row["step"]


def assert_equal(run: Path, expected: Path) -> None:
    actual, wanted = weights(run), weights(expected)
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def runs(
    tiny_config: Callable[..., PretrainConfig],
    small_overrides: Callable[[Path], list[str]],
    small_data,
    on_ranks,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """All runs of this file, by name: 12 steps of 8 images with up to two rows, and rows of text, each."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, *overrides: str) -> list[str]:
        # the rate is small, as AdamW's first updates turn any rounding of a gradient near 0 into a full step
        return [*small_overrides(folder), "train.learning_rate=1e-5", *overrides, f"run.name={name}"]

    def staged(name: str, stage: str, *more: str) -> list[str]:
        captions = [f"data.annotations={small_data.captions}"] if stage == "align" else []
        return job(f"{name}-{stage}", f"train.stage={stage}", "train.per_device_batch_size=2", *captions, *more)

    lora = ["train=lora", "train.epochs=null", "train.learning_rate=1e-3", "train.betas=[0.9,0.98]"]
    lora += ["train.global_batch_size=8", "train.per_device_batch_size=4", "train.max_steps=12", "train.num_workers=0"]
    lora += ["train.log_every=1", "train.save_every=4"]
    alone = [
        *(staged("1x4", stage) for stage in STAGES),
        job("lora-1", *lora),
        job("tokens-1", "train.global_batch_tokens=700", "train.per_device_batch_tokens=200"),
    ]
    for overrides in alone:
        pretrain(tiny_config(*overrides))
    cut = ["train.per_device_batch_size=4", "train.learning_rate=1e-3"]
    ends = on_ranks(
        2,
        *(staged("2x2", stage) for stage in STAGES),
        job("replicated", "parallel.replicate=2", "train.per_device_batch_size=2"),
        job("whole-towers", "parallel.shard_frozen=false", "train.per_device_batch_size=2"),
        job("synced", "parallel.defer_gradient_sync=false", "train.per_device_batch_size=2"),
        job("recomputed", "parallel.recompute=2", "train.per_device_batch_size=2"),
        job("lora-2", *lora),
        job("tokens-2", "train.global_batch_tokens=700", "train.per_device_batch_tokens=200"),
        job("bf16", "parallel.precision=bf16", *cut),
        job("on-two", *cut),
        job("on-two-cut", *cut, "train.max_minutes=1e-6"),  # stops after its first step
        job("on-two-cut", *cut),
    )
    stopped = ends.pop(-2)
    assert all(end is not None and end.startswith("Interrupted: Stopped after step 1 of 12") for end in stopped)
    assert not any(end for job_ends in ends for end in job_ends), ends
    ends = on_ranks(4, staged("4x1", "finetune"), staged("replicated-twice", "finetune", "parallel.replicate=2"))
    assert not any(end for job_ends in ends for end in job_ends), ends
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_give_the_curve_of_one(runs: Path, stage: str) -> None:
    assert_same_curve(runs / f"2x2-{stage}", runs / f"1x4-{stage}")


@pytest.mark.parametrize("name", ["4x1", "replicated-twice"])
def test_four_ranks_give_the_curve_of_one(runs: Path, name: str) -> None:
    assert_same_curve(runs / f"{name}-finetune", runs / "1x4-finetune")


@pytest.mark.parametrize("name", ["replicated", "whole-towers", "synced", "recomputed"])
def test_how_it_is_sharded_changes_nothing(runs: Path, name: str) -> None:
    assert_same_curve(runs / name, runs / "1x4-finetune")


def test_token_budget_gives_the_same_curve_on_two_ranks(runs: Path) -> None:
    assert_same_curve(runs / "tokens-2", runs / "tokens-1")


def test_an_image_shared_on_one_rank_alone_stops_nobody(
    on_ranks, tiny_config, small_overrides, small_data, tmp_path: Path
) -> None:
    """One image has two rows, all others have one: the ranks still read their batches in the same number of passes."""
    rows_of = {row["id"]: row for row in json.loads(small_data.annotations.read_text())}
    chosen = [rows_of[f"{image}/0"] for image in range(8)] + [rows_of["0/1"]]
    (tmp_path / "train.json").write_text(json.dumps(chosen))
    common = [*small_overrides(tmp_path), f"data.annotations={tmp_path / 'train.json'}", "train.learning_rate=1e-5"]
    common += ["train.global_batch_size=4", "train.per_device_batch_size=2", "train.max_steps=4"]
    assert on_ranks(2, [*common, "parallel.timeout_minutes=1", "run.name=two"]) == [[None, None]]
    pretrain(tiny_config(*common, "run.name=one"))
    assert_same_curve(tmp_path / "two", tmp_path / "one")


def test_exported_model_is_whole(runs: Path) -> None:
    """A sharded run writes the same names and shapes as one process, and nearly the same numbers."""
    actual, expected = weights(runs / "2x2-finetune"), weights(runs / "1x4-finetune")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=12 * 2 * 1e-5, msg=name)


def test_adapters_learn_alike_and_are_merged(runs: Path) -> None:
    one, two = weights(runs / "lora-1"), weights(runs / "lora-2")
    assert one.keys() == two.keys() == weights(runs / "1x4-finetune").keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-3, msg=name)
    for row, wanted in zip(rows(runs / "lora-2"), rows(runs / "lora-1"), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert rows(runs / "lora-1")[-1]["loss"] < 0.95 * rows(runs / "lora-1")[0]["loss"]


def test_half_precision_follows_the_curve(runs: Path) -> None:
    """bf16 compute under sharding: weights are kept in float32, the scan's own parameters computed in it."""
    for row, wanted in zip(rows(runs / "bf16"), rows(runs / "on-two"), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    trained = {name: t for name, t in weights(runs / "bf16").items() if not name.startswith("vision.")}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_stopped_run_goes_on_bit_for_bit(runs: Path) -> None:
    assert_equal(runs / "on-two-cut", runs / "on-two")
    assert [row["loss"] for row in rows(runs / "on-two-cut")] == [row["loss"] for row in rows(runs / "on-two")]


def test_checkpoint_goes_on_at_another_number_of_ranks(
    runs: Path, on_ranks, tiny_config, small_overrides, tmp_path: Path
) -> None:
    """Saved by two, read by one, and the other way round."""
    common = ["train.per_device_batch_size=4", "train.learning_rate=1e-5", "resume=anyway", "train.max_steps=12"]
    short = [*common[:2], "train.max_steps=4"]
    base = small_overrides(tmp_path)
    assert on_ranks(2, [*base, *short, "run.name=two-first"]) == [[None, None]]
    pretrain(tiny_config(*base, *short, "run.name=one-first"))
    assert on_ranks(2, [*base, *common, "run.name=one-first"]) == [[None, None]]
    pretrain(tiny_config(*base, *common, "run.name=two-first"))
    pretrain(tiny_config(*base, *short, "run.name=alone"))
    pretrain(tiny_config(*base, *common, "run.name=alone"))
    for name in ("one-first", "two-first"):
        assert_same_curve(tmp_path / name, tmp_path / "alone")
