"""Fixtures for all tests: the real configs at a small size, rendered data, test assets, no network."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; spinning threads slow all others

import hydra
import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image, ImageDraw

from cobra.config import ModelConfig, PretrainConfig, as_config
from cobra.models.build import build_model
from cobra.models.vlm import CobraVLM
from cobra.text.tokenizer import Tokenizer
from cobra.train.run import pretrain

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"

# The tiny model with its shipped towers and tokenizer, but less of a language model.
SMALL_MODEL = ["model.llm.d_model=32", "model.llm.num_layers=2", "model.max_length=64", "parallel.device=cpu"]

# The same examples each time, as everywhere else in these tests; `--hypothesis-profile=default` draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

# One thread where several processes run tests side by side, which is faster; also of the scripts that tests start.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Refuse every connection that leaves this machine."""
    if request.node.get_closest_marker("network"):
        return

    def check(host: object) -> None:
        try:
            is_local = host in (None, "localhost") or ipaddress.ip_address(str(host)).is_loopback
        except ValueError:
            is_local = False
        if not is_local:
            raise AssertionError(f"A test without the marker `network` tried to reach {host!r}.")

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return method(self, address)

        return call

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture(autouse=True)
def _own_folders_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the user's own folders and backend."""
    for name in ("COBRA_DATA", "COBRA_RUNS", "COBRA_RESULTS", "COBRA_OPS_BACKEND", "COBRA_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of test assets that are not part of the repository: `data/` and `fixtures/`."""
    folder = os.environ.get("COBRA_TEST_ASSETS")
    if not folder:
        pytest.skip("COBRA_TEST_ASSETS does not name the folder of test assets")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PretrainConfig]:
    """Compose `configs/pretrain.yaml` with overrides, through the typed door."""

    def compose(*overrides: str) -> PretrainConfig:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return as_config(PretrainConfig, hydra.compose("pretrain", overrides=list(overrides)))

    return compose


@pytest.fixture(scope="session")
def small_model_config(tiny_config: Callable[..., PretrainConfig]) -> ModelConfig:
    """The tiny model with a smaller language model."""
    return tiny_config(*SMALL_MODEL).model


@pytest.fixture
def small_model(small_model_config: ModelConfig) -> CobraVLM:
    """A fresh model that sees its image: random weights, but not so small that every output is the same."""
    model = build_model(small_model_config, seed=0)
    return excite(model)


@torch.no_grad()
def excite(model: CobraVLM) -> CobraVLM:
    """Make a fresh model's outputs differ clearly from token to token and image to image."""
    model.llm.backbone.embedding.weight *= 25  # from 0.02 to 0.5
    for block in model.llm.backbone.layers:
        block.mixer.out_proj.weight *= 4
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tiny model's tokenizer."""
    return Tokenizer(ROOT / "cobra" / "assets" / "tiny" / "tokenizer.json")


@dataclass(frozen=True)
class SmallData:
    """A LLaVA data set on disk, and the overrides that make `pretrain` use it."""

    annotations: Path
    captions: Path  # the rows with an image, as the align stage needs them
    images: Path

    @property
    def overrides(self) -> list[str]:
        return [
            f"data.annotations={self.annotations}",
            f"data.images={self.images}",
            f"data.index={self.annotations.parent / 'index'}",
            "data.source=null",
            "data.rows_per_image=2",
        ]

    def image(self, number: int) -> Path:
        return self.images / f"{number}.png"


def draw(rng: np.random.Generator) -> tuple[Image.Image, str, str]:
    """Draw one shape; return the image with the names of shape and colour."""
    shape = str(rng.choice(["circle", "rectangle"]))
    color = str(rng.choice(["red", "green", "blue"]))
    image = Image.new("RGB", (56, 72), "white")
    left, top = rng.integers(0, 20, 2).tolist()
    box = (left, top, left + int(rng.integers(20, 34)), top + int(rng.integers(20, 34)))
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=color)
    return image, shape, color


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """24 drawn images with three questions each, and six rows of text alone."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(24):
        image, shape, color = draw(rng)
        image.save(folder / "images" / f"{number}.png")
        questions = {
            "what shape is in the image?": shape,
            f"what color is the {shape}?": color,
            "is there a red shape?": "Yes" if color == "red" else "No",
        }
        rows += [
            {"id": f"{number}/{i}", "image": f"{number}.png", "conversations": talk(f"<image>\n{question}", answer)}
            for i, (question, answer) in enumerate(questions.items())
        ]
    rows += [{"id": f"text/{i}", "conversations": talk("is it a circle?", "No", "so?", "a" * i)} for i in range(6)]
    for name, chosen in (("train", rows), ("captions", [row for row in rows if "image" in row])):
        (folder / f"{name}.json").write_text(json.dumps(chosen))
    return SmallData(folder / "train.json", folder / "captions.json", folder / "images")


def talk(*values: str) -> list[dict[str, str]]:
    """Messages of a conversation in LLaVA's format, human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture(scope="session")
def trained_run(
    tiny_config: Callable[..., PretrainConfig], small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of a small model trained until its answers depend on image and question."""
    overrides = [
        *SMALL_MODEL,
        *small_data.overrides,
        f"data.annotations={small_data.captions}",
        "data.rows_per_image=3",
        f"paths.runs={tmp_path_factory.mktemp('runs')}",
        "train.global_batch_size=24",
        "train.per_device_batch_size=24",
        "train.max_steps=60",
        "train.learning_rate=1e-2",
    ]
    return pretrain(tiny_config(*overrides))


@pytest.fixture(scope="session")
def small_overrides(small_data: SmallData) -> Callable[[Path], list[str]]:
    """Overrides of a 12-step run on the small data, at about 20 steps a second, with its run folder below `runs`."""
    return lambda runs: [
        *SMALL_MODEL,
        *small_data.overrides,
        f"paths.runs={runs}",
        "run.name=small",
        "train.global_batch_size=8",
        "train.per_device_batch_size=4",
        "train.max_steps=12",
        "train.save_every=4",
        "train.log_every=1",
    ]


@pytest.fixture
def small_run(small_overrides: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    """The small run's overrides, in a folder of the test's own."""
    return small_overrides(tmp_path / "runs")


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """The command line of a script, such as `command("pretrain", "run.seed=1")`."""
    return lambda name, *arguments: [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]


@pytest.fixture
def script(command: Callable[..., list[str]], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in the test's own folder and wait for it."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(name, *arguments), cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run
