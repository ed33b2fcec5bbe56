"""A run to compare with, trained once, and a way to train others like it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cobra.config import PretrainConfig
from cobra.train.run import pretrain

from .runs import Fit


@pytest.fixture(scope="session")
def whole_run(
    tiny_config: Callable[..., PretrainConfig],
    small_overrides: Callable[[Path], list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The small run, undisturbed, with all its checkpoints. Tests only read it."""
    runs = tmp_path_factory.mktemp("whole")
    more = ["train.keep_checkpoints=3", "parallel.peak_tflops=0.05", "run.name=small"]
    return pretrain(tiny_config(*small_overrides(runs), *more))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than the small run itself; `whole_run` has them."""
    monkeypatch.setattr("cobra.train.run.plot_run", lambda run_folder: None)


@pytest.fixture
def fit(tiny_config: Callable[..., PretrainConfig], small_run: list[str]) -> Fit:
    """Train the small run with further overrides; return the run folder."""
    return lambda *overrides: pretrain(tiny_config(*small_run, *overrides))


@pytest.fixture
def finished(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, where `fit` looks for it."""
    return shutil.copytree(whole_run, tmp_path / "runs" / "small")
