"""A folder as `make demo` leaves it, in small, in which the documentation's code runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import SMALL_TRAINING

from cobra.config import PretrainConfig
from cobra.data.conversations import read_rows
from cobra.data.easyvqa import conversations
from cobra.runtime import write_text
from cobra.train.run import pretrain


@pytest.fixture(scope="session")
def small_easyvqa(small_data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as easy-VQA's: 24 images with three questions each."""
    folder = tmp_path_factory.mktemp("data") / "easyvqa"
    rows = list(read_rows(small_data.captions))
    for split in ("train", "test"):
        shutil.copytree(small_data.images, folder / "images" / split)
        turns = [row.turns[0] for row in rows]
        questions, answers = ([turn[i].removeprefix("<image>\n") for turn in turns] for i in range(2))
        numbers = [int(Path(str(row.image)).stem) for row in rows]
        write_text(folder / f"{split}.json", json.dumps(conversations(split, questions, answers, numbers)))
    return folder


@pytest.fixture(scope="session")
def after_demo(
    small_easyvqa: Path, tiny_config: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(small_easyvqa, folder / "data" / "easyvqa")
    paths = [f"paths.{name}={folder / name}" for name in ("data", "runs", "results")]
    run = pretrain(tiny_config(*SMALL_TRAINING, *paths))
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-000002", checkpoints / "step-000400")  # the last one's name after `make demo`
    return folder


@pytest.fixture
def scratch(after_demo: Path, small_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: `runs/tiny`, `data/easyvqa`, pictures, and data of one's own."""
    shutil.copytree(after_demo, tmp_path, dirs_exist_ok=True)
    for number, name in enumerate(("photo", "a", "b", "photos/1", "photos/2")):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        shutil.copy(small_data.image(number), file)
    (tmp_path / "rows.csv").write_text("image,question,answer\n1.png,what is it?,a shape\n2.png,what is it?,another\n")
    (tmp_path / "questions.txt").write_text("what shape is it?\n")
    for name in ("data", "runs", "results"):
        monkeypatch.setenv(f"COBRA_{name.upper()}", str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    return tmp_path
