"""Losses, gradients and parameters that are not finite."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import cobra.train.run
from cobra.errors import NumericsError
from cobra.models.loss import labelled_loss
from cobra.models.sharded import read_sharded
from cobra.train import checkpoint

from .runs import Fit, assert_equal, at_step, interrupt_after_second_save, rows, state, weights


def spoil_loss(loss: Tensor) -> Tensor:
    return loss * math.nan


def spoil_gradient(loss: Tensor) -> Tensor:
    """The loss stays what it is."""
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], how: Callable[[Tensor], Tensor] = spoil_loss) -> None:
    """Spoil the first micro-batch of some steps, counted from 0."""
    todo = set()

    def poisoned(*args: Any) -> tuple[Tensor, Tensor]:
        loss_sum, count = labelled_loss(*args)
        if todo:
            todo.clear()
            return how(loss_sum), count
        return loss_sum, count

    monkeypatch.setattr("cobra.models.vlm.labelled_loss", poisoned)
    at_step(monkeypatch, steps, lambda: todo.add(1))


@pytest.mark.parametrize("how", [spoil_loss, spoil_gradient])
def test_one_step_is_skipped_and_counted(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: Callable[[Tensor], Tensor]
) -> None:
    spoil(monkeypatch, {5}, how)
    run = fit("train.save_every=1", "train.keep_checkpoints=12")
    found = rows(run)
    assert [row["skipped_steps"] for row in found] == [0] * 5 + [1] * 7
    assert [row["step"] for row in found if row["loss"] is None] == [6]
    before, after, later = (state(run / "checkpoints" / f"step-{step:06d}") for step in (5, 6, 7))
    assert_equal(after, before)  # neither weights nor moments have moved
    assert any(not later[key].equal(before[key]) for key in before)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(run).values())
    (warning,) = [record.getMessage() for record in caplog.records if "The update was not made" in record.getMessage()]
    assert warning.startswith("Step 6: loss ")


def test_metrics_stay_json_for_everybody(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """`NaN` is none of JSON's words."""
    spoil(monkeypatch, {1})
    run = fit("train.max_steps=3")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in found] == [row["grad_norm"] is None for row in found] == [False, True, False]


def test_only_steps_in_a_row_end_the_run(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3, 5, 7, 9})
    assert rows(fit("train.max_skipped_steps=2"))[-1]["skipped_steps"] == 4


def test_too_many_in_a_row_name_their_rows(fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    iterate = cobra.train.run.iterate

    def watched(*args: Any, **kwargs: Any) -> Any:
        for batches in iterate(*args, **kwargs):
            seen.append([name for batch in batches for name in batch.ids])
            yield batches

    monkeypatch.setattr(cobra.train.run, "iterate", watched)
    spoil(monkeypatch, {5, 6, 7, 8})
    with pytest.raises(NumericsError, match=r"^Step 8: loss nan, .* last of 3 steps in a row without") as caught:
        fit("train.max_skipped_steps=3")
    message = str(caught.value)
    assert "\n" not in message and "Try a lower train.learning_rate" in message
    named = re.findall(r"'([\w/]+)'", message)
    assert named == seen[7][:8] and ("..." in message) == (len(seen[7]) > 8)
    newest = checkpoint.latest(tmp_path / "runs" / "small" / "checkpoints")
    assert newest is not None and newest.name == "step-000004" and f"{newest.parent} is good" in message
    assert not (tmp_path / "runs" / "small" / "model").exists()


def test_resumed_run_goes_on_counting(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, {2})
        interrupt_after_second_save(patch)
        with pytest.raises(KeyboardInterrupt):
            fit()
    run = fit()
    assert [row["skipped_steps"] for row in rows(run)] == [0, 0] + [1] * 10
    assert [row["step"] for row in rows(run) if row["loss"] is None] == [3]


def test_parameters_stop_before_the_update(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def rate(step: int, *_: Any) -> float:
        steps.append(step)
        return math.nan if step == 5 else 1e-3  # the next step finds weights of NaN

    monkeypatch.setattr("cobra.train.trainer.learning_rate", rate)
    with pytest.raises(NumericsError, match=r"^Step 7: .*\bNaN\b.*last checkpoint in .* is good") as caught:
        fit()
    assert "\n" not in str(caught.value)
    assert sorted(set(steps)) == list(range(7))


def test_parameters_that_are_not_finite_are_not_saved(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cobra.train.trainer.learning_rate", lambda step, *_: math.nan if step == 5 else 1e-3)
    with pytest.raises(NumericsError, match=r"^Step 6: .* parameter \S+\.weight\b.*last checkpoint in .* is good"):
        fit("train.save_every=1")
    newest = checkpoint.latest(tmp_path / "runs" / "small" / "checkpoints")
    assert newest is not None and newest.name == "step-000005"
    assert all(bool(tensor.isfinite().all()) for tensor in read_sharded(newest).values())
