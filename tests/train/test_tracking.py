"""Weights & Biases: reached, not reached, not asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from .runs import Fit, assert_equal, losses, weights

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_works_offline(fit: Fit) -> None:
    run = fit("tracker=wandb", "tracker.wandb.mode=offline", "train.max_steps=2")
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(losses(run)) == 2


def test_training_goes_on_when_it_cannot_be_reached(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, whole_run: Path
) -> None:
    init, modes = wandb.init, []

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        modes.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out after 30.0 sec.\nPlease try again.")
        return init(*args, **kwargs)

    monkeypatch.setattr(wandb, "init", unreachable)
    run = fit("tracker=wandb", "tracker.wandb.mode=online")
    assert modes == ["online", "offline"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "W&B cannot be reached (Run initialization has timed out after 30.0 sec.)" in warning
    assert f"offline to {run}/wandb" in warning and "\n" not in warning
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert_equal(weights(run), weights(whole_run))
    assert losses(run) == losses(whole_run)


def test_run_that_loses_it_on_the_way_goes_on(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, whole_run: Path
) -> None:
    """W&B's own threads send; what its calls raise must not end a run either."""

    class Run:
        def log(self, *_: Any, **__: Any) -> None:
            raise wandb.errors.CommError("gone")

        def finish(self) -> None:
            raise wandb.errors.CommError("gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    assert_equal(weights(fit("tracker=wandb", "tracker.wandb.mode=offline")), weights(whole_run))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("W&B has failed (gone).")  # once, not every step
