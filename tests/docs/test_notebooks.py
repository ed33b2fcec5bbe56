"""The notebooks run from first to last cell with a barely trained tiny model, and are committed with clean outputs."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cobra.config import PretrainConfig
from cobra.train.run import pretrain

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [file.stem for file in FILES]

# The two trainings of the notebooks, shorter; run as the last cell, the checks say what must have come out.
STEPS = {"3_evaluate_and_compare": 2, "4_finetune_on_your_data": 20}
CHECKS = {
    "1_quickstart": """
        assert all(abs(sum(values) - 1) < 1e-5 for values in probabilities) and len(probabilities) == len(morphs)
        assert "".join(pieces) == vlm.generate(image, "is there a triangle in the image?")
        assert [turn[0] for turn in chat.history][1:] == ["what color is the triangle?", "is there a blue shape?"]
        assert vlm.generate(state, questions) == [vlm.generate(image, question) for question in questions]
    """,
    "2_what_the_model_sees": """
        read = vlm.encode_image(picture).state.ssm  # in one pass, where the notebook took one step per token
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(read, states[num_patches - 1].ssm, strict=True))
        assert changes.shape == (len(read), num_patches) and bool((changes >= 0).all())
        assert norms.shape == (sequence.shape[1], len(read))
        assert len(hidden) == len(alone) == side * side
        assert torch.allclose(early[-1], p_yes(picture, questions[1])[0], atol=1e-3)
        corner = windowed(0, 0, hide=True)  # the window is cut at the picture's edge: 2 x 2 patches
        assert corner.crop((16, 0, 64, 64)).tobytes() == picture.crop((16, 0, 64, 64)).tobytes()
        assert len(corner.crop((0, 0, 16, 16)).getcolors()) == 1
    """,
    "3_evaluate_and_compare": """
        scores = [
            [json.loads(line)["official"] for line in Path(f"results/easyvqa/{name}/scores.jsonl").open()]
            for name in ("tiny", "tiny-short")
        ]
        means = [100 * sum(one) / len(one) for one in scores]
        assert abs(pair.first_accuracy - means[0]) < 1e-9 and abs(pair.difference - means[1] + means[0]) < 1e-9
        assert len(lost) == sum(a > b for a, b in zip(*scores)) and len(won) == sum(a < b for a, b in zip(*scores))
    """,
    "4_finetune_on_your_data": """
        learnt = json.loads(Path("data/flags/flags.json").read_text())
        assert len(learnt) == 240 and not {row["image"] for row in learnt} & {row["image"] for row in test_rows}
        assert not set(before) & set(ANSWERS.values())  # words that the model had never seen
        assert metrics[-1]["loss"] < metrics[0]["loss"] / 2 and after != before
        assert metrics[-1]["step"] == STEPS and set(remembered) == {"before", "after"}
    """,
}


@pytest.fixture(scope="module")
def project(
    tiny_config: Callable[..., PretrainConfig], small_data: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder as `make demo` leaves it: a tiny model, trained for seconds, and data that passes for easy-VQA."""
    folder = tmp_path_factory.mktemp("project")
    data = folder / "data" / "easyvqa"
    rows = [row for row in json.loads(small_data.captions.read_text()) if int(Path(row["image"]).stem) < 12]
    for split in ("train", "test"):
        shutil.copytree(small_data.images, data / "images" / split)
        (data / f"{split}.json").write_text(json.dumps([{**row, "image": f"{split}/{row['image']}"} for row in rows]))
    for file in (data / "images").rglob("*.png"):
        Image.open(file).resize((64, 64)).save(file)  # squares, as easy-VQA's
    overrides = [
        *small_data.overrides, f"data.annotations={small_data.captions}", "parallel.device=cpu",
        f"paths.runs={folder / 'runs'}", "train.max_steps=20", "train.global_batch_size=8",
        "train.per_device_batch_size=8", "train.save_every=1000",
    ]  # fmt: skip
    pretrain(tiny_config(*overrides))
    (folder / "notebooks").mkdir()
    return folder


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for JUPYTER_PATH, in which the kernel `this-python` is the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("jupyter")
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--HistoryManager.enabled=False"]
    spec = {"argv": command, "display_name": "this Python", "language": "python"}
    (folder / "kernels" / "this-python").mkdir(parents=True)
    (folder / "kernels" / "this-python" / "kernel.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name: str, project: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(kernel))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if name in STEPS:
        shorten(notebook, STEPS[name])
    notebook.cells.append(nbformat.v4.new_code_cell(textwrap.dedent(CHECKS[name])))
    folder = project if name in STEPS else project / "notebooks"  # a notebook program starts in either
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="this-python", resources=resources).execute()


def shorten(notebook: Any, steps: int) -> None:
    """Put `steps` for the number of the notebook's line `STEPS = ...`."""
    cell = next(cell for cell in notebook.cells if "\nSTEPS = " in cell.source)
    cell.source = re.sub(r"\nSTEPS = \d+", f"\nSTEPS = {steps}", cell.source)


def test_there_are_four_notebooks() -> None:
    assert set(NAMES) == set(CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_clean(name: str) -> None:
    file = ROOT / "notebooks" / f"{name}.ipynb"
    assert file.stat().st_size < 400_000
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from first to last cell"
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        shown = output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if k.startswith("text/"))
        assert not re.search(r"Warning|Traceback|\r|\x1b|it/s\]", shown), shown
    texts = json.dumps([cell.source for cell in notebook.cells]) + json.dumps(
        [{k: v for k, v in o.get("data", {}).items() if k.startswith("text/")} | {"": o.get("text")} for o in outputs]
    )
    path = re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|var|mnt)\b.{20}|\b[A-Z]:\\\\", texts)
    assert path is None, path


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / "notebooks" / target).is_file(), target
