"""docs/extending.md, step by step: the files that it shows are written where it says, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import cobra
from cobra.config import LLMConfig
from cobra.models.mamba import MambaLM

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH_ABOVE = re.compile(r"`([\w./-]+)`:\s*$")  # for files that have no comments
PATH_INSIDE = re.compile(r"(# @package .+\n)?# ([\w./-]+\.(?:py|yaml))\n")

# One process runs many commands: most of the time of each is the import of its libraries.
DRIVER = """
import json, runpy, sys
from cobra.__main__ import main
for number, words in enumerate(json.loads(sys.argv[1])):
    for stream in (sys.stdout, sys.stderr):
        print(f"command {number}", file=stream, flush=True)
    sys.argv = words[2:] if words[1] == "-m" else words[1:] if words[0] == "python" else words
    try:
        if words[0] == "cobra":
            main()
        elif words[1] == "-m":
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@dataclass
class Section:
    """What a section of the page asks its reader to do."""

    files: dict[str, str] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # shown as text

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)


def read_page() -> dict[str, Section]:
    """The sections by the last word of their headings."""
    sections: dict[str, Section] = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        section = sections[part.partition("\n")[0].split()[-1]] = Section()
        for block in BLOCK.finditer(part):
            language, content = block.groups()
            named = PATH_INSIDE.match(content)
            if language == "bash":
                section.commands += [shlex.split(line, comments=True) for line in content.splitlines()]
            elif language == "text":
                section.lines += content.splitlines()
            elif named:
                section.files[named.group(2)] = (named.group(1) or "") + content[named.end() :]
            else:
                above = PATH_ABOVE.search(part[: block.start()])
                assert above, f"the page does not say where this file is:\n{content}"
                section.files[above.group(1)] = content
    return sections


SECTIONS = read_page()
SAID = {"0": "triangle", "1": " Box", "2": "red"}  # answers to the page's three questions, two of them right


@dataclass
class Place:
    """A working directory where commands have run."""

    folder: Path
    outputs: list[str] = field(default_factory=list)  # of each command
    logs: list[str] = field(default_factory=list)

    def run(self, package: Path, commands: list[list[str]], **environment: str) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("COBRA_")}
        process = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(commands)],
            cwd=self.folder,
            env={**own, "PYTHONPATH": str(package), **environment},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        self.outputs, self.logs = (
            re.split(r"^command \d+\n", text, flags=re.M)[1:] for text in (process.stdout, process.stderr)
        )

    def steps(self, run: str) -> list[int]:
        rows = [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        return [row["step"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def small(small_overrides: Callable[[Path], list[str]]) -> list[str]:
    """Overrides of two steps of two images, on drawn data."""
    free = [text for text in small_overrides(Path("runs")) if not text.startswith(("run.name=", "model.max_length="))]
    return [*free, "train.global_batch_size=2", "train.per_device_batch_size=2", "train.max_steps=2"]


@pytest.fixture(scope="module")
def tuned() -> dict[str, Any]:
    """The language model that the page calls my-mamba, but smaller: its sizes and its weights."""
    sizes = {"d_model": 32, "num_layers": 2, "vocab_size": 365}
    model = MambaLM(LLMConfig(**sizes, tokenizer="any", prompt="mamba"))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.full_like(tensor, -1) if name.endswith("A_log") else torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    return {"sizes": sizes, "weights": weights}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small: list[str], small_data: Any, tuned: dict[str, Any]) -> Place:
    """A folder of the user's own, in which the sections that need no clone have been followed."""
    place = Place(tmp_path_factory.mktemp("place"))
    for name in ("encoder", "Mamba", "benchmark", "recipe"):
        SECTIONS[name].write(place.folder)
    weights = place.folder / "weights" / "me" / "my-mamba"
    weights.mkdir(parents=True)
    save_file(tuned["weights"], weights / "model.safetensors")
    sizes = [f"model.llm.{key}={value}" for key, value in tuned["sizes"].items()]
    images = place.folder / "data" / "easyvqa" / "images"
    images.mkdir(parents=True)
    (images / "test").symlink_to(small_data.images)
    rows = [json.dumps({"question_id": one, "prediction": text}) + "\n" for one, text in SAID.items()]
    (place.folder / "said.jsonl").write_text("".join(rows))

    describe, encoder = SECTIONS["encoder"].commands
    (mamba,) = SECTIONS["Mamba"].commands
    evaluate, score, validated = SECTIONS["benchmark"].commands
    (recipe,) = SECTIONS["recipe"].commands
    place.run(
        ROOT,
        [
            describe,
            [*encoder, *small, "model.vision.towers.0.weights=random"],
            [*mamba, *small, *sizes, "model.llm.tokenizer=cobra:tiny/tokenizer.json", "train.learning_rate=1e-6"],
            ["cobra", "pretrain", "run.name=tiny", *small],
            [*evaluate, "device=cpu"],
            score,
            [*score[:-1], "predictions=said.jsonl"],
            [*validated, *small, "validation.every=1"],
            [*recipe, "--cfg", "job"],
        ],
        COBRA_WEIGHTS=str(place.folder / "weights"),
    )
    return place


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Place:
    """A copy of the project in which the other sections have been followed. The compiled CPU kernels are shared."""
    folder, kernels = tmp_path_factory.mktemp("clone"), Path("cobra/ops/backends/cpu")
    for name in ("cobra", "configs", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    shutil.rmtree(folder / kernels)
    (folder / kernels).symlink_to(ROOT / kernels)
    shutil.copy(ROOT / "pyproject.toml", folder)

    projector, backend = SECTIONS["projector"], SECTIONS["backend"]
    code = projector.files["cobra/models/projector.py"]
    (line,) = projector.lines
    module, config = folder / "cobra" / "models" / "projector.py", folder / "cobra" / "config" / "model.py"
    above, table, below = module.read_text().partition("PROJECTORS: dict")
    changed = f"{above}{code}\n\n{table}" + below.replace("{\n", f"{{\n{line}\n", 1)
    name = line.partition(":")[0].strip()
    names = config.read_text().replace("PROJECTOR_KINDS = (", f"PROJECTOR_KINDS = ({name}, ")
    projector.write(folder)
    backend.write(folder)
    module.write_text(changed)
    config.write_text(names)
    place = Place(folder)
    commands = [*projector.commands, *backend.commands]
    place.run(folder, [[*words, *small] if "scripts/pretrain.py" in words else words for words in commands])
    return place


def test_sections_are_those_of_the_table() -> None:
    assert list(SECTIONS) == ["encoder", "Mamba", "projector", "benchmark", "backend", "recipe"]
    assert all(section.files and section.commands for section in SECTIONS.values())


def test_vision_encoder(place: Place) -> None:
    assert "dinov3" in place.outputs[0]
    assert place.steps("dinov3") == [1, 2]
    vlm = cobra.load(place.folder / "runs" / "dinov3")
    assert vlm.model.num_image_tokens == 16 * 16
    assert vlm.model.vision.width == 384


def test_mamba(place: Place, tuned: dict[str, Any]) -> None:
    assert place.steps("my-mamba") == [1, 2]
    vlm = cobra.load(place.folder / "runs" / "my-mamba")
    assert vlm.prompt.question(" hi ") == "### Question\nhi\n### Answer\n"
    assert vlm.prompt.question("more?", is_first=False) == "\n### Question\nmore?\n### Answer\n"
    embedding = vlm.model.llm.backbone.embedding.weight
    assert (embedding - tuned["weights"]["backbone.embedding.weight"]).abs().max() < 1e-4


def test_benchmark(place: Place) -> None:
    folder = place.folder / "results" / "shapes" / "tiny"
    answers = [json.loads(row) for row in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {row["question_id"] for row in answers} == set(SAID)
    results = json.loads((folder / "results.json").read_text())
    assert results["num_questions"] == 3
    assert "| color |" in (folder / "report.md").read_text()
    scored, said = (json.loads(text.splitlines()[-1]) for text in place.outputs[5:7])
    assert scored["rules"]["official"]["accuracy"] == results["accuracy"]
    assert said["rules"]["official"]["accuracy"] == pytest.approx(100 * 2 / 3)
    assert (place.folder / "runs" / "validated" / "metrics.jsonl").read_text().count("validation/shapes") == 2


def test_recipe(place: Place) -> None:
    config = yaml.safe_load(place.outputs[8])
    assert config["run"]["name"] == config["model"]["name"] == "tiny-dinov3"
    assert config["model"]["vision"]["towers"][0]["image_size"] == 256
    assert config["model"]["projector"]["kind"] == "gelu-mlp"
    assert config["train"]["learning_rate"] == 1e-3 and config["train"]["max_steps"] == 400


def test_projector(clone: Place) -> None:
    describe, _, tests, *_ = clone.outputs
    assert re.search(r"image tokens +16\b", describe), describe
    assert clone.steps("pixel-shuffle") == [1, 2]
    assert re.search(r"^\d+ passed", tests, re.MULTILINE), tests
    weights = load_file(clone.folder / "runs" / "pixel-shuffle" / "model" / "model.safetensors")
    assert weights["projector.projector.1.weight"].shape == (32, 4 * 128)


def test_kernel_backend(clone: Place) -> None:
    *_, table, tests, _ = clone.outputs
    assert "float32 on cpu: torch_norm" in table
    assert re.search(r"^[1-9]\d* passed", tests, re.MULTILINE), tests
    assert clone.steps("torch-norm") == [1, 2]
    assert "torch_norm, asked for by name" in clone.logs[-1]
