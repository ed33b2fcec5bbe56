"""Training through the script: ranks, validation, a stop on the way, two stages; and that docs/training.md is true."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import cobra
from cobra.config import PretrainConfig, as_dict, flatten

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
Script = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., PretrainConfig]


@dataclass(frozen=True)
class Journey:
    """The same run by one process, and by two that were stopped on the way."""

    one: Path
    two: Path
    exit_code: int  # of the stop
    messages: str
    checkpoint: str  # that the stop left


@pytest.fixture(scope="module")
def journey(
    command: Callable[..., list[str]],
    small_overrides: Callable[[Path], list[str]],
    small_data: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Journey:
    folder = tmp_path_factory.mktemp("journey")
    benchmark = folder / "easyvqa"  # the benchmark's files, with the small data's questions
    benchmark.mkdir()
    (benchmark / "train.json").write_text("[]")
    (benchmark / "test.json").write_bytes(small_data.captions.read_bytes())
    (benchmark / "images").symlink_to(small_data.images)
    shared = [
        *small_overrides(folder / "runs"),
        f"data.annotations={small_data.captions}",
        "data.rows_per_image=3",
        "train.global_batch_size=24",
        "train.per_device_batch_size=12",
        "train.max_steps=50",
        "train.learning_rate=1e-2",
        "train.save_every=50",
        "validation.every=25",
        "validation.limit=null",
        "benchmark@validation.benchmark=easyvqa",
        f"validation.benchmark.folder={benchmark}",
    ]
    one = command("pretrain", *shared, "run.name=one")
    result = subprocess.run(one, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    two = command("pretrain", *shared, "run.name=two", "parallel.processes=2")
    process = subprocess.Popen(two, cwd=folder, stderr=subprocess.PIPE, text=True)
    metrics = folder / "runs" / "two" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=300)
    checkpoint = (folder / "runs" / "two" / "checkpoints" / "latest").read_text().strip()
    result = subprocess.run(two, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"Resuming from {folder}/runs/two/checkpoints/{checkpoint}" in result.stderr
    return Journey(folder / "runs" / "one", folder / "runs" / "two", process.returncode, messages, checkpoint)


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def test_sigterm_saves_and_ends_with_75(journey: Journey) -> None:
    assert journey.exit_code == 75, journey.messages
    assert "Traceback" not in journey.messages
    step = int(journey.checkpoint.removeprefix("step-"))
    assert 5 <= step < 50
    assert f"Stopped after step {step} of 50" in journey.messages


def test_two_stopped_ranks_train_as_one_process(journey: Journey) -> None:
    one, two = (lines(run, "loss") for run in (journey.one, journey.two))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [*range(1, 51)]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)


def test_two_ranks_find_the_percentages_of_one(journey: Journey) -> None:
    one, two = (lines(run, "validation/easyvqa") for run in (journey.one, journey.two))
    assert [row["step"] for row in one] == [25, 50]
    assert one == two
    assert one[-1]["validation/easyvqa"] > 40  # it has learnt something to ask for


def test_checkpoint_loads_and_converts_like_the_model(journey: Journey, script: Script, tmp_path: Path) -> None:
    checkpoint = journey.two / "checkpoints" / "step-000050"
    question = ("what shape is in the image?", ["circle", "rectangle"])
    image = next((journey.one.parents[1] / "easyvqa" / "images").glob("*.png"))
    found = [cobra.load(folder).score(image, *question) for folder in (checkpoint, journey.two)]
    assert found[0] == found[1]
    result = script("convert", str(checkpoint), "exported", "--to", "cobra")
    assert result.returncode == 0, result.stderr
    weights = (journey.two / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == weights


def test_two_stages_run_one_after_the_other(
    script: Script, small_overrides: Callable[[Path], list[str]], small_data: Any, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    settings = [text for text in small_overrides(runs) if not text.startswith("run.name=")]
    settings += [f"data.annotations={small_data.captions}", "train.max_steps=2"]

    result = script("pretrain", "+experiment=tiny-aligned", *settings)
    assert result.returncode == 1 and not runs.exists()
    (line,) = result.stderr.splitlines()
    assert "cobra pretrain +experiment=tiny-align " in line

    result = script("pretrain", "--multirun", "+experiment=tiny-align,tiny-aligned", *settings)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in runs.iterdir() if path.is_dir()} == {"tiny-align", "tiny-aligned"}
    assert f"init_from: {runs}/tiny-align" in (runs / "tiny-aligned" / "config.yaml").read_text()


def test_swept_experiments_of_one_run_name_get_two_folders(tmp_path: Path) -> None:
    settings = ["run.name=sum", "run.seed=0,1", f"paths.runs={tmp_path}", "parallel.device=cpu"]
    command = [sys.executable, str(STAND_IN), "--multirun", "+experiment=tiny,tiny-lora", *settings]
    subprocess.run(command, check=True, timeout=300)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"sum-experiment-{name}_run.seed-{seed}" for name in ("tiny", "tiny-lora") for seed in (0, 1)
    }


DOCS = [ROOT / "docs" / name for name in ("training.md", "clusters.md")]


def test_documented_settings_exist(tiny_config: Compose) -> None:
    known = flatten(as_dict(tiny_config("train=lora", "tracker=wandb")))
    known |= {key.rsplit(".", 1)[0]: None for key in known}
    text = "\n".join(file.read_text() for file in DOCS)
    named = set(re.findall(r"\b((?:train|parallel|data|validation|tracker|run)\.[a-z_.]*[a-z_])\b", text))
    assert len(named) > 40
    files = (".yaml", ".sbatch", ".jsonl", ".md")
    assert {key for key in named if key not in known and not key.endswith(files)} == set()


def test_documented_metrics_are_those_of_a_run(journey: Journey) -> None:
    table = (ROOT / "docs" / "training.md").read_text().split("| key | what it is |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == lines(journey.one, "loss")[0].keys()
