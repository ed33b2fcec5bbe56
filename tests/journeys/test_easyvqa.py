"""Train on easy-VQA and evaluate, through the scripts: a short run beats every answer given without the image."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("easy_vqa")

QUESTION_ONLY = 67.0  # per cent: the best that can be done without looking at the image
EVALUATE = ["benchmark=easyvqa", "limit=1500", "batch_size=250", "model=runs/tiny", "device=cpu"]


@pytest.fixture(scope="module")
def folder(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained and evaluated run in it."""
    folder = tmp_path_factory.mktemp("journey")
    for arguments in (
        command("pretrain", "train.max_steps=100", "train.log_every=20", "data.check=exists", "parallel.device=cpu"),
        command("evaluate", *EVALUATE),
    ):
        result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def predictions(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({row["question_id"] for row in rows}) == len(rows)
    return {row["question_id"]: row["prediction"] for row in rows}


def test_short_run_beats_the_question_only_baseline(folder: Path) -> None:
    found = results(folder / "results" / "easyvqa" / "tiny")
    assert found["num_questions"] == 1500 and len(found["by_type"]) == 6
    assert found["accuracy"] > QUESTION_ONLY + 8


def test_results_folder_is_complete(folder: Path) -> None:
    names = {path.name for path in (folder / "results" / "easyvqa" / "tiny").iterdir()}
    assert {"predictions.jsonl", "results.json", "report.md", "by_type.png", "examples.png"} <= names
    assert {path.name for path in folder.iterdir()} == {"data", "runs", "results"}


def test_second_evaluation_asks_nothing(folder: Path, command: Callable[..., list[str]]) -> None:
    target = folder / "results" / "easyvqa" / "tiny"
    before = results(target)
    subprocess.run(command("evaluate", *EVALUATE), cwd=folder, check=True, capture_output=True)
    after = results(target)
    assert before["asked_now"] == 1500 and after["asked_now"] == 0
    for key in ("accuracy", "by_type", "num_questions"):
        assert after[key] == before[key]


def test_limit_takes_answers_that_are_there(folder: Path, command: Callable[..., list[str]]) -> None:
    target = folder / "nested"
    for limit in (300, 200, 400):
        arguments = command("evaluate", *EVALUATE, f"limit={limit}", f"output={target}")
        subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    assert results(target)["asked_now"] == 100 and results(target)["num_questions"] == 400


def test_killed_evaluation_goes_on_to_the_same_predictions(folder: Path, command: Callable[..., list[str]]) -> None:
    target = folder / "killed"
    arguments = command("evaluate", *EVALUATE, f"output={target}", "batch_size=10")
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = target / "predictions.jsonl"
    while not file.exists() or file.read_text().count("\n") < 100:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    num_done = len([line for line in file.read_text().split("\n") if line.endswith("}")])
    assert 100 <= num_done < 1500
    subprocess.run(command("evaluate", *EVALUATE, f"output={target}"), cwd=folder, check=True, capture_output=True)
    assert results(target)["asked_now"] == 1500 - num_done
    assert predictions(target) == predictions(folder / "results" / "easyvqa" / "tiny")
