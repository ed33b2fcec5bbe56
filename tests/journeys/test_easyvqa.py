"""Train on easy-VQA and evaluate, through the scripts: a short run beats every answer given without the image."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("easy_vqa")

README = Path(__file__).resolve().parents[2] / "README.md"
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


def test_readme_python_runs(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()  # what it streams


COMMANDS = re.findall(r"^ {4}((?:python|torchrun) [^#\n]+)", README.read_text(), flags=re.MULTILINE)
CONVERSIONS = [line for line in COMMANDS if "convert.py" in line]


def test_readme_conversion_loads_again(folder: Path, command: Callable[..., list[str]]) -> None:
    assert CONVERSIONS[0].split()[2:4] == ["runs/tiny", "exported"]
    for line in CONVERSIONS:
        subprocess.run(command("convert", *line.split()[2:]), cwd=folder, check=True)
    (load,) = re.findall(r"^ {4}(vlm = cobra\.load\(\"exported\".*\))", README.read_text(), flags=re.MULTILINE)
    subprocess.run([sys.executable, "-c", f"import cobra\n{load}"], cwd=folder, check=True)


# data=mine is what the command before it makes; tests of own data are in tests/data.
@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in CONVERSIONS and "data=mine" not in line])
def test_readme_command_composes(folder: Path, line: str) -> None:
    if "-m cobra.describe" in line:
        command = line.split()[1:]
    else:
        script, *arguments = line[line.index("scripts/") :].split()  # torchrun's own arguments are before it
        if "--help" not in arguments:
            arguments = [argument for argument in arguments if argument != "--multirun"] + ["--cfg", "job"]
        if "--rerun" in arguments:
            assert Path(folder / arguments[arguments.index("--rerun") + 1]).is_file()
            return
        arguments = [re.sub(r"=([\w-]+),.*", r"=\1", argument) for argument in arguments]  # one value of a sweep
        command = [str(README.parent / script), *arguments]
    result = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
