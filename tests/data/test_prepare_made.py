"""Data sets that Cobra makes itself, through the prepare journey."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from mini_set import TINY

from cobra.config import DataConfig, PathsConfig, PrepareConfig
from cobra.data import makers
from cobra.data.prepare.run import prepare
from cobra.data.toy.folder import Toy
from cobra.data.toy.folder import prepare as make_toy
from cobra.errors import DataError

SMALL = Toy(train=6, vqav2=3, gqa=1, vizwiz=2, textvqa=2, vsr=2, pope=2, refcoco=2)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(makers._MAKERS, "toy", lambda folder: make_toy(folder, SMALL))


def run(root: Path, **settings: Any) -> None:
    data = DataConfig(
        name="toy",
        source="toy",
        annotations=str(root / "toy" / "train.json"),
        images=str(root / "toy" / "train_images"),
        index=str(root / "index"),
    )
    config = PrepareConfig(paths=PathsConfig(data=str(root)), sets=["toy"], tokenizer=str(TINY), jobs=1, **settings)
    prepare(config, configs=root, data_config=lambda name: data if name == "toy" else None, questions=lambda _: [])


def test_it_is_made_and_checked(tmp_path: Path) -> None:
    run(tmp_path)
    found = json.loads((tmp_path / "reports" / "toy" / "report.json").read_text())
    assert found["is_good"] and found["sets"]["toy"]["images"] == SMALL.train


def test_a_dry_run_makes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, dry_run=True)
    assert "made by Cobra itself" in caplog.text and not any(tmp_path.iterdir())


def test_a_check_makes_nothing_and_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"toy is not in order: .* made again"):
        run(tmp_path, check=True)
    assert not (tmp_path / "toy").exists()
    run(tmp_path)
    next((tmp_path / "toy" / "train_images").iterdir()).unlink()
    with pytest.raises(DataError, match="not in order"):
        run(tmp_path, check=True)
