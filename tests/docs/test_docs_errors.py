"""docs/troubleshooting.md shows errors as they are: each one is provoked here and compared with the page.

On the page an entry is a heading `###` with the message in the text block below it. `<...>` in a message stands for
whatever is there: a folder, a number, a reason that the system gives. A message of another program has a comment before
its block, `<!-- of: pip -->`, and is not provoked.
"""

from __future__ import annotations

import json
import logging
import math
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image

import cobra
from cobra.api import Cobra
from cobra.config import EvaluateConfig, ModelConfig, PathsConfig, PretrainConfig, ScoreConfig, ServeConfig, as_dict
from cobra.convert import convert
from cobra.data.prepare.download import RemoteFile, download
from cobra.data.prepare.manifest import load_manifest
from cobra.data.prepare.own import prepare_own
from cobra.data.prepare.plan import check_space
from cobra.data.sampler import check_world_size
from cobra.errors import CobraError
from cobra.eval.benchmark import Choices
from cobra.eval.benchmarks.vsr import VSR
from cobra.eval.run import evaluate_all
from cobra.eval.scoring import score
from cobra.models.build import build_model
from cobra.models.loss import labelled_loss
from cobra.models.weights import save_model_folder
from cobra.ops import use_backend
from cobra.text.tokenizer import Tokenizer
from cobra.train.folder import locked
from cobra.train.run import pretrain

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
ENTRY = re.compile(
    r"^### (?P<title>.+?)\n+(?:<!-- of: (?P<program>.+?) -->\n)?```text\n(?P<message>.*?)\n```", re.M | re.S
)

ENTRIES = {found["title"]: found for found in ENTRY.finditer(PAGE.read_text(encoding="utf-8"))}
OURS = [title for title, found in ENTRIES.items() if not found["program"]]


@dataclass
class Kit:
    """What provocations need."""

    tmp: Path
    monkeypatch: pytest.MonkeyPatch
    caplog: pytest.LogCaptureFixture
    small_run: list[str]
    config: Callable[..., PretrainConfig]
    get: Callable[[str], Any]  # a fixture by its name, where only some entries need it

    def train(self, *overrides: str) -> Path:
        return pretrain(self.config(*self.small_run, *overrides))

    def trained(self) -> None:
        """Make the run folder of the small run's settings, as far as it is looked at before anything else."""
        folder = self.tmp / "runs" / "small"
        checkpoint = folder / "checkpoints" / "step-000012"
        checkpoint.mkdir(parents=True)
        (checkpoint.parent / "latest").write_text(checkpoint.name)
        (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(self.config(*self.small_run))))

    def model_folder(self) -> Path:
        return shutil.copytree(self.get("saved_model"), self.tmp / "model")

    def vlm(self) -> Cobra:
        return cobra.load(self.model_folder(), device="cpu")

    def vsr(self, num_images: int = 2) -> VSR:
        """Two statements about each of two images, of which the first ones are there."""
        folder = self.tmp / "data" / "vsr"
        (folder / "images").mkdir(parents=True)
        rows = [{"image": f"{i // 2}.png", "caption": "It is red.", "label": 1, "relation": "is"} for i in range(4)]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i in range(num_images):
            Image.new("RGB", (8, 8)).save(folder / "images" / f"{i}.png")
        return VSR(data_root=str(self.tmp / "data"), prompt="{question}")

    def score(self, *rows: dict[str, Any]) -> None:
        file = self.tmp / "predictions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        score(ScoreConfig(paths=PathsConfig(), predictions=str(file)), self.vsr())

    def evaluate(self, model: Path, benchmark: VSR, **settings: Any) -> None:
        paths = PathsConfig(results=str(self.tmp / "results"))
        evaluate_all(EvaluateConfig(paths=paths, load=str(model), device="cpu", **settings), [benchmark])

    def command(self, *words: str) -> None:
        """Check a command line as the scripts do before they begin."""
        from _command_line import check

        self.monkeypatch.setattr(sys, "argv", ["x.py", *words[1:]])
        check(words[0], [])


@pytest.fixture(scope="session")
def saved_model(
    small_model_config: ModelConfig, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model_folder(build_model(small_model_config, seed=0), tokenizer.file, folder)
    return folder


@pytest.fixture
def kit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    small_run: list[str],
    tiny_config: Callable[..., PretrainConfig],
    request: pytest.FixtureRequest,
) -> Kit:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr("cobra.train.run.plot_run", lambda run_folder: None)
    GlobalHydra.instance().clear()
    return Kit(tmp_path, monkeypatch, caplog, small_run, tiny_config, request.getfixturevalue)


Provocation = Callable[[Kit], object]
PROVOKED: dict[str, Provocation] = {}


def provokes(title: str) -> Callable[[Provocation], Provocation]:
    """Register what leads to the message of an entry: it raises a CobraError, ends with a log line, or returns it."""

    def register(provocation: Provocation) -> Provocation:
        PROVOKED[title] = provocation
        return provocation

    return register


# Installation


@provokes("Python is too old")
def _(kit: Kit) -> str:
    old = kit.tmp / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (kit.tmp / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (kit.tmp / "pyproject.toml").touch()
    done = subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={old}", "demo"], cwd=kit.tmp, capture_output=True, text=True
    )
    assert done.returncode != 0
    return done.stdout.strip()


@provokes("Outside the environment")
def _(kit: Kit) -> str:
    program = [sys.executable, "-S", str(ROOT / "scripts" / "evaluate.py"), "benchmark=easyvqa"]
    done = subprocess.run(program, cwd=kit.tmp, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.strip()


def without(kit: Kit, *packages: str) -> None:
    """Make some packages look as if they were not installed."""
    find = util.find_spec
    hidden = dict.fromkeys(packages)
    for name in hidden:
        kit.monkeypatch.setitem(sys.modules, name, None)
    for place in ("importlib.util.find_spec", "cobra.data.easyvqa.find_spec", "cobra.runtime.find_spec"):
        kit.monkeypatch.setattr(place, lambda name, *more: None if name in hidden else find(name, *more), raising=False)


@provokes("easy-VQA is not installed")
def _(kit: Kit) -> None:
    without(kit, "easy_vqa")
    pretrain(kit.config(f"paths.data={kit.tmp}", f"paths.runs={kit.tmp}"))


@provokes("The server, the page or W&B is not installed")
def _(kit: Kit) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "serve.py"))["main"]  # `serve` is a package of tests, too
    without(kit, "fastapi", "uvicorn")
    main(OmegaConf.create({"load": "runs/tiny"}))


# Devices and kernels


@provokes("No GPU")
def _(kit: Kit) -> None:
    kit.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kit.train("parallel.device=cuda")


@provokes("A kernel backend that cannot run here")
def _(kit: Kit) -> None:
    from cobra.ops.backends import mamba_ssm

    kit.monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: None)
    with use_backend("mamba_ssm"):
        pass


@provokes("Out of memory in training")
def _(kit: Kit) -> None:
    from _launch import _errors_in_one_line

    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    kit.monkeypatch.setattr("cobra.models.vlm.labelled_loss", too_much)
    with _errors_in_one_line("pretrain"):
        kit.train()


# Settings


@provokes("A misspelt setting")
def _(kit: Kit) -> None:
    kit.command("pretrain", "train.max_stepz=3")


@provokes("Settings with dashes")
def _(kit: Kit) -> None:
    kit.command("pretrain", "--experiment", "tiny")


@provokes("A misspelt choice")
def _(kit: Kit) -> None:
    kit.command("pretrain", "model/projector=fused-gelu")


@provokes("An experiment without its plus")
def _(kit: Kit) -> None:
    kit.command("pretrain", "experiment=tiny")


@provokes("No benchmark")
def _(kit: Kit) -> None:
    kit.command("evaluate", "model=runs/tiny")


@provokes("A value of the wrong type")
def _(kit: Kit) -> None:
    kit.config("train.max_steps=many")


@provokes("No SLURM")
def _(kit: Kit) -> None:
    from _launch import _errors_in_one_line

    submitit = pytest.importorskip("submitit")
    kit.monkeypatch.setenv("PATH", str(kit.tmp))
    with _errors_in_one_line("pretrain"):
        submitit.SlurmExecutor(kit.tmp)


# Models and weights


def no_hub(kit: Kit, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    kit.monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    kit.monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@provokes("No such run")
def _(kit: Kit) -> None:
    cobra.load(kit.tmp / "runs" / "nothing" / "here")


@provokes("No network, or a name that the Hub does not have")
def _(kit: Kit) -> None:
    no_hub(kit, ConnectionError("[Errno 111] Connection refused"))
    cobra.load("cobra-3b")


@provokes("A gated or private repository")
def _(kit: Kit) -> None:
    class Refused(huggingface_hub.errors.HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "401 Client Error.")

    no_hub(kit, Refused())
    kit.train("model.llm.weights=some/mamba")


@provokes("Weights that are not public")
def _(kit: Kit) -> None:
    cobra.load("cobra-8b")


@provokes("COBRA_WEIGHTS names no folder")
def _(kit: Kit) -> None:
    kit.monkeypatch.setenv("COBRA_WEIGHTS", str(kit.tmp / "weights"))
    cobra.load("cobra-3b")


@provokes("A run that has not finished")
def _(kit: Kit) -> None:
    (kit.tmp / "runs" / "tiny" / "checkpoints").mkdir(parents=True)
    cobra.load("runs/tiny")


@provokes("A language model instead of a whole model")
def _(kit: Kit) -> None:
    convert(str(kit.model_folder()), kit.tmp / "mamba", "mamba")
    cobra.load(kit.tmp / "mamba")


@provokes("A file of weights that was cut short")
def _(kit: Kit) -> None:
    folder = kit.model_folder()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cobra.load(folder)


@provokes("A pointer of Git LFS")
def _(kit: Kit) -> None:
    folder = kit.model_folder()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    cobra.load(folder)


@provokes("A pickle that holds more than tensors")
def _(kit: Kit) -> None:
    file = kit.tmp / "model.pt"
    torch.save({"model": Path("any object")}, file)
    kit.train(f"model.llm.weights={file}")


@provokes("Weights of another model")
def _(kit: Kit) -> None:
    folder = kit.model_folder()
    config = json.loads((folder / "config.json").read_text())
    config["llm"]["num_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    cobra.load(folder)


@provokes("A tokenizer that is not the model's")
def _(kit: Kit) -> None:
    kit.train("model.llm.vocab_size=50277")


@provokes("The target of a conversion exists")
def _(kit: Kit) -> None:
    convert("runs/tiny", kit.tmp, "cobra")


# Data


@provokes("The data is not there yet")
def _(kit: Kit) -> None:
    kit.train("data=llava-v1.5", f"data.annotations={kit.tmp}/llava.json")


@provokes("Images are missing")
def _(kit: Kit) -> None:
    images = Path(kit.get("small_data").images)
    some = kit.tmp / "images"
    some.mkdir()
    for file in sorted(images.iterdir())[2:]:
        (some / file.name).symlink_to(file)
    kit.train(f"data.images={some}", f"data.index={kit.tmp}/index")


@provokes("The wrong format")
def _(kit: Kit) -> None:
    file = kit.tmp / "rows.json"
    file.write_text(json.dumps([{"question": "what is it?", "answer": "a cat"}]))
    kit.train(f"data.annotations={file}", f"data.index={kit.tmp}/index")


@provokes("Own data that is not in order")
def _(kit: Kit) -> None:
    (kit.tmp / "photos").mkdir()
    (kit.tmp / "rows.csv").write_text("image,question,answer\n1.jpg,What is it?,A cat\n2.jpg,,A dog\n")
    prepare_own(kit.tmp / "rows.csv", kit.tmp / "photos", "mine", kit.tmp / "mine", kit.tmp / "configs")


@provokes("The disk is too small")
def _(kit: Kit) -> None:
    kit.monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**10))
    check_space([load_manifest("coco-train2017")], kit.tmp)


@provokes("A download fails")
def _(kit: Kit) -> None:
    download([RemoteFile(urls=((kit.tmp / "nothing").as_uri(),), target=kit.tmp / "images.zip", size=10)])


# Training


@provokes("The batch is not divisible")
def _(kit: Kit) -> None:
    kit.train("train.global_batch_size=32", "train.per_device_batch_size=12")


@provokes("The batch is not divisible by the ranks")
def _(kit: Kit) -> None:
    check_world_size(kit.config("train.global_batch_size=32", "train.per_device_batch_size=16").train, 3)


@provokes("The first stage is missing")
def _(kit: Kit) -> None:
    from pretrain import check_first_stage

    check_first_stage(kit.config("+experiment=tiny-aligned"))


@provokes("The run folder belongs to other settings")
def _(kit: Kit) -> None:
    kit.trained()
    kit.train("train.learning_rate=1e-4")


@provokes("The run folder is not empty")
def _(kit: Kit) -> None:
    kit.trained()
    kit.train("resume=never")


@provokes("Two processes in one run folder")
def _(kit: Kit) -> None:
    with locked(kit.tmp / "runs" / "small"):
        kit.train()


@provokes("The loss is NaN")
def _(kit: Kit) -> None:
    def spoilt(*arguments: Any) -> Any:
        loss, count = labelled_loss(*arguments)
        return loss * math.nan, count

    kit.monkeypatch.setattr("cobra.models.vlm.labelled_loss", spoilt)
    kit.train("train.max_skipped_steps=2", "train.global_batch_size=4")


@provokes("A rank was killed")
def _(kit: Kit) -> None:
    from _ranks import _failure

    raise _failure(3, 8, -9)


# Evaluation


@provokes("A benchmark's files are missing")
def _(kit: Kit) -> None:
    kit.evaluate(kit.tmp, VSR(data_root="data", prompt="{question}"))


@provokes("A benchmark's images are missing")
def _(kit: Kit) -> None:
    kit.evaluate(kit.tmp, kit.vsr(num_images=1))


@provokes("Two words that are not single tokens")
def _(kit: Kit) -> None:
    questions = [replace(one, answer=Choices(words=("Undoubtedly", "Unthinkable"))) for one in kit.vsr().questions()]
    benchmark = VSR(data_root="", prompt="")
    kit.monkeypatch.setattr(benchmark, "questions", lambda: questions)
    kit.evaluate(kit.model_folder(), benchmark)


@provokes("The results folder belongs to another model")
def _(kit: Kit) -> None:
    benchmark, model = kit.vsr(), kit.model_folder()
    folder = kit.tmp / "results" / "vsr" / "model"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").touch()
    (folder / "fingerprint.json").write_text(json.dumps({"weights": "of another model"}))
    kit.evaluate(model, benchmark)


@provokes("Ids that are missing, doubled or unknown")
def _(kit: Kit) -> None:
    yes = {"probabilities": {"True": 0.75, "False": 0.25}}
    kit.score(*({"question_id": number} | yes for number in (0, 1, 1, 17)))


@provokes("The predictions of another benchmark")
def _(kit: Kit) -> None:
    kit.score({"question_id": 201427626, "prediction": "blue"})


@provokes("NaN in the answers")
def _(kit: Kit) -> None:
    kit.score({"question_id": 0, "probabilities": {"True": math.nan, "False": math.nan}})


# Asking


@provokes("An image that is not there")
def _(kit: Kit) -> None:
    kit.vlm().generate("photo.png", "what is it?")


@provokes("An image that does not decode")
def _(kit: Kit) -> None:
    (kit.tmp / "photo.png").write_text("<html>404</html>")
    kit.vlm().generate("photo.png", "what is it?")


@provokes("A chat about several images")
def _(kit: Kit) -> None:
    image = Image.new("RGB", (8, 8))
    kit.vlm().chat([image, image])  # type: ignore[arg-type]


@provokes("The port is in use")
def _(kit: Kit) -> None:
    from cobra.serve.run import listen

    with socket.create_server(("127.0.0.1", 0)) as other:
        listen(ServeConfig(load="x", port=other.getsockname()[1]))


@provokes("A quantised model cannot be saved")
def _(kit: Kit) -> None:
    cobra.load(kit.model_folder(), device="cpu", quantize="int8").save_pretrained(kit.tmp / "saved")


def happened(kit: Kit, provocation: Provocation) -> str:
    """Return the message that a user sees."""
    try:
        with kit.caplog.at_level(logging.ERROR, "cobra"):
            told = provocation(kit)
    except CobraError as error:
        return f"error: {error}"
    except SystemExit as left:
        assert left.code not in (0, None)
        return [record.getMessage() for record in kit.caplog.records if record.levelno == logging.ERROR][-1]
    assert isinstance(told, str), "nothing was wrong"
    return told


def pattern(message: str) -> str:
    """Return the regular expression of a message with placeholders."""
    parts = re.split(r"(<[a-z0-9 ,'.]+>)", message)
    return "".join(".+?" if part.startswith("<") else re.escape(part) for part in parts)


@pytest.mark.parametrize("title", PROVOKED)
def test_message_on_the_page_is_the_real_one(title: str, kit: Kit) -> None:
    message = happened(kit, PROVOKED[title])
    assert title in OURS, f"the page has no entry for: {message}"
    assert re.fullmatch(pattern(ENTRIES[title]["message"]), message, re.DOTALL), message


def test_every_entry_is_provoked_and_advises() -> None:
    assert set(OURS) == set(PROVOKED) and len(OURS) >= 20
    text = PAGE.read_text(encoding="utf-8")
    assert len(re.findall(r"^### ", text, re.MULTILINE)) == len(ENTRIES)  # each has a message of the right form
    for number, found in enumerate(ENTRIES.values()):
        rest = text[found.end() :].split("\n##")[0]
        assert len(rest.split()) >= 8, f"entry {number}, {found['title']}, says nothing of why and what to do"
