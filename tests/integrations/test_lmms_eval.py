"""The real lmms-eval asks a small trained Cobra: `make test-lmms-eval` runs this where lmms-eval is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import cobra
from cobra.api import Cobra
from cobra.data.conversations import read_rows

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed here")
TASKS = Path(__file__).parent / "lmms_tasks"
CHOICES = ["circle", "rectangle", "triangle", "Yes", "No", "red", "green", "blue"]

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shapes(small_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data's 72 questions with their images, as one file."""
    from datasets import Dataset, Image

    rows = [
        {
            "image": str(small_data.images / str(row.image)),
            "question": row.turns[0][0].strip(),
            "answer": row.turns[0][1],
        }
        for row in read_rows(small_data.annotations)
        if row.image
    ]
    folder = tmp_path_factory.mktemp("shapes")
    documents = [{**row, "image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in rows]
    Dataset.from_list(documents).cast_column("image", Image()).to_parquet(folder / "shapes.parquet")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def model(trained_run: Path) -> Cobra:
    return cobra.load(trained_run, device="cpu")


@pytest.fixture
def run(shapes: Path, trained_run: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Rows]]]:
    """Run lmms-eval on tasks; return its results, and by task its samples in the documents' order."""

    def lmms_eval(tasks: str, *arguments: str, processes: int = 1) -> tuple[dict[str, Any], dict[str, Rows]]:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
        command = [
            *(sys.executable, *launcher, "-m", "lmms_eval", "--model", "cobra"),
            *("--model_args", f"pretrained={trained_run}", "--device", "cpu", "--batch_size", "10"),
            *("--tasks", tasks, "--include_path", str(TASKS), "--log_samples", "--output_path", str(tmp_path)),
            *("--verbosity", "DEBUG"),  # else an error ends with the exit code 0
            *arguments,
        ]
        folders = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment = {**os.environ, **folders, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=shapes, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        (results,) = tmp_path.rglob("*_results.json")
        samples: dict[str, Rows] = {}
        for file in tmp_path.rglob("*_samples_*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            samples[file.stem.split("_samples_")[1]] = sorted(rows, key=lambda row: row["doc_id"])
        return json.loads(results.read_text())["results"], samples

    return lmms_eval


def test_entry_point_is_installed() -> None:
    (point,) = (point for point in entry_points(group="lmms_eval.models") if point.name == "cobra")
    manifest = point.load()()
    assert manifest.model_id == "cobra"
    from lmms_eval.models import get_model

    assert not get_model("cobra").is_simple and get_model("cobra", force_simple=True).is_simple


def test_answers_equal_cobras_own(run: Any, model: Cobra, shapes: Path) -> None:
    results, samples = run("shapes_open,shapes_blind,shapes_rounds")
    rows = json.loads((shapes / "rows.json").read_text())
    questions = [row["question"] for row in rows]
    seen = [model.generate(row["image"], row["question"], max_new_tokens=6) for row in rows]
    assert [sample["filtered_resps"] for sample in samples["shapes_open"]] == seen
    right = sum(answer == row["answer"] for answer, row in zip(seen, rows, strict=True))
    assert results["shapes_open"]["exact_match,none"] == pytest.approx(right / 72)
    assert right > 36
    assert [sample["filtered_resps"] for sample in samples["shapes_blind"]] == model.generate(
        None, questions, max_new_tokens=6
    )
    second = [
        model.generate(row["image"], f"is there a {answer} shape?") for row, answer in zip(rows, seen, strict=True)
    ]
    assert [sample["filtered_resps"] for sample in samples["shapes_rounds"]] == [
        list(pair) for pair in zip(seen, second, strict=True)
    ]


def test_likelihoods_are_the_models_probabilities(run: Any, model: Cobra, shapes: Path) -> None:
    """All choices are single tokens of this model, so their likelihoods differ as `Cobra.score` says."""
    results, samples = run("shapes_choice", "--force_simple")
    rows = json.loads((shapes / "rows.json").read_text())
    right = 0
    for sample, row in zip(samples["shapes_choice"], rows, strict=True):
        likelihoods = [-float(loss) for loss, _ in sample["filtered_resps"]]
        probabilities = model.score(row["image"], row["question"], CHOICES)
        total = math.log(sum(map(math.exp, likelihoods)))
        assert [math.exp(found - total) for found in likelihoods] == pytest.approx(probabilities, abs=1e-4)
        right += CHOICES[probabilities.index(max(probabilities))] == row["answer"]
    assert results["shapes_choice"]["acc,none"] == pytest.approx(right / 72)


def test_two_processes_give_the_answers_of_one(run: Any, model: Cobra, shapes: Path) -> None:
    _, samples = run("shapes_open", processes=2)
    rows = json.loads((shapes / "rows.json").read_text())
    assert [sample["filtered_resps"] for sample in samples["shapes_open"]] == [
        model.generate(row["image"], row["question"], max_new_tokens=6) for row in rows
    ]
