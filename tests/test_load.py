"""`cobra.load` of the public release's layout: what that release computes, this computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
import yaml
from omegaconf import open_dict
from PIL import Image

import cobra
from cobra.config import EvaluateConfig, PathsConfig, PretrainConfig, as_config
from cobra.errors import CheckpointError, ConfigError
from cobra.eval.benchmarks.easyvqa import EasyVQA
from cobra.eval.run import evaluate
from cobra.models.export import write_public_run
from cobra.models.image import ImageTransform
from cobra.models.public import LLMS, VISION, public_config
from cobra.models.vlm import CobraVLM
from cobra.text.tokenizer import Tokenizer
from cobra.train.run import pretrain

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TOLERANCE = 1e-4
VISION_ID, LLM_ID = "dinosiglip-vit-so-384px", "mamba-2.8b-zephyr"
QUESTION = "What color is the circle in the picture?"


class PublicRun:
    """The fixture and what its ids resolve to."""

    def __init__(self, assets: Path) -> None:
        self.home = assets / "fixtures" / "public-cobra-tiny"
        self.folder = next((self.home / "run").iterdir())
        self.meta = json.loads((self.home / "meta.json").read_text())
        self.outputs = np.load(self.home / "outputs.npz")
        models = json.loads((self.home / "vision_models.json").read_text())
        towers = []
        for model in models.values():
            args = dict(model["create_model_kwargs"])
            size = args.pop("img_size")
            args = {key: value for key, value in args.items() if key not in ("pretrained", "num_classes")}
            towers.append(
                {"timm": model["name"], "image_size": size, "args": args, "weights": str(self.home / model["file"])}
            )
        self.vision: dict[str, Any] = {"towers": towers}
        sizes = json.loads((self.home / "llm_hub_config.json").read_text())
        self.llm: dict[str, Any] = {
            "d_model": sizes["d_model"],
            "num_layers": sizes["n_layer"],
            "tokenizer": str(assets / "data" / "gpt-neox-tokenizer" / "tokenizer.json"),
        }

    def load(self, template: str = "zephyr", **options: Any) -> cobra.Cobra:
        options = {"vision": self.vision, "llm": self.llm | {"prompt": template}, "device": "cpu"} | options
        return cobra.load(self.folder, **options)

    def image(self, name: str) -> Image.Image:
        return Image.open(self.home / "images" / f"{name}.png")


@pytest.fixture(scope="module")
def public(assets: Path) -> PublicRun:
    return PublicRun(assets)


@pytest.fixture(scope="module", params=["zephyr", "mamba"])
def template(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vlm(public: PublicRun, template: str) -> cobra.Cobra:
    return public.load(template)


def views(vlm: cobra.Cobra, *images: Image.Image) -> list[torch.Tensor]:
    return [torch.stack(view) for view in zip(*map(vlm.model.vision.transform, images), strict=True)]


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_public_pixels(public: PublicRun, strategy: str) -> None:
    vlm = public.load(vision=public.vision | {"resize": strategy})
    transform: ImageTransform = vlm.model.vision.transform
    pixels = np.load(public.home / "pixels_56px.npz")
    for path in sorted((public.home / "images").iterdir()):
        found = transform(Image.open(path))
        for tower, name in enumerate(("dino", "siglip")):
            module = vlm.model.vision.towers[tower]
            normalised = (found[transform.view_of_tower[tower]] - module.mean) / module.std  # type: ignore[operator]
            close(normalised, pixels[f"dinosiglip-vit-so-384px/{strategy}/{name}/{path.stem}"])


@torch.no_grad()
def test_public_features_and_embeddings(public: PublicRun) -> None:
    vlm = public.load()
    for path in sorted((public.home / "images").iterdir()):
        pixels = views(vlm, Image.open(path))
        features = vlm.model.vision(pixels)
        close(features[0], public.outputs[f"patch_features/{path.stem}"])
        close(vlm.model.projector(features)[0], public.outputs[f"projected/{path.stem}"])


@torch.no_grad()
def test_public_logits(public: PublicRun, vlm: cobra.Cobra, template: str) -> None:
    ids = vlm.tokenizer.encode(vlm.prompt.question(QUESTION))
    assert ids == public.meta["forward"][template]["input_ids"]
    output = vlm.model(torch.tensor([ids]), pixels=views(vlm, public.image("main_120x90")))
    columns = public.outputs["logit_columns"]
    close(output.hidden[0], public.outputs[f"final_hidden/{template}"])
    close(output.logits[0][:, columns], public.outputs[f"logits_cols/{template}"])
    close(output.logits[0, -1], public.outputs[f"logits_full_last/{template}"])
    close(output.logits[0].logsumexp(-1), public.outputs[f"logits_lse/{template}"])
    text = vlm.model(torch.tensor([ids])).logits[0]
    close(text[:, columns], public.outputs[f"textonly_logits_cols/{template}"])


def test_public_greedy_answers(public: PublicRun, vlm: cobra.Cobra, template: str) -> None:
    expected = public.meta["generation"][template]
    answer = vlm.generate(public.image("main_120x90"), QUESTION, max_new_tokens=expected["max_new_tokens"])
    assert answer == vlm.tokenizer.decode(expected["ids"]).strip() == expected["generate_text"]
    image, ids = vlm.encode_image(public.image("main_120x90")), []
    with torch.inference_mode():
        prompt = torch.tensor([vlm.tokenizer.encode(vlm.prompt.question(QUESTION))])
        hidden, state = vlm.model.llm(vlm.model.llm.embed(prompt), state=image.state)
        hidden = hidden[:, -1]
        for _ in expected["ids"]:
            ids.append(int(vlm.model.llm.head(hidden).argmax()))
            hidden, state = vlm.model.llm.step(torch.tensor(ids[-1:]), state)
    assert ids == expected["ids"]


def test_public_choice_probabilities(public: PublicRun, vlm: cobra.Cobra, template: str) -> None:
    probabilities = {"main_120x90": public.meta["generation"][template]}
    for pair in (["Yes", "No"], ["True", "False"]):
        found = vlm.score(public.image("main_120x90"), QUESTION, pair)
        expected = probabilities["main_120x90"][f"probs_{'_'.join(pair)}"][0]
        assert found == pytest.approx(expected, abs=1e-5)
        if template == "zephyr":
            for name, both in public.meta["probs_by_image"].items():
                found = vlm.score(public.image(name), QUESTION, pair)
                assert found == pytest.approx(both["_".join(pair)], abs=1e-5)


@pytest.mark.parametrize("batch", ["mm2", "mixed", "text_only", "align2"])
def test_public_training_losses_and_gradients(public: PublicRun, batch: str) -> None:
    """A mixed batch is one of image rows and one of text rows here: their sums add up."""
    vlm, expected = public.load(), public.meta["training"][batch]
    for parameter in [*vlm.model.projector.parameters(), *vlm.model.llm.parameters()]:
        parameter.requires_grad_(True)
    data = {name: public.outputs[f"train/{batch}/{name}"] for name in ("input_ids", "labels", "multimodal_indices")}
    ids, labels = torch.from_numpy(data["input_ids"]), torch.from_numpy(data["labels"])
    with_image = data["multimodal_indices"].tolist()
    without = [row for row in range(len(ids)) if row not in with_image]
    loss, count = torch.zeros(()), torch.zeros(())
    if with_image:
        pixels = views(vlm, *(public.image(name) for name in expected["images"] if name))
        output = vlm.model(ids[with_image], pixels=pixels, labels=labels[with_image])
        loss, count = loss + output.loss_sum, count + output.num_labels
        columns = public.outputs["logit_columns_train"]
        close(output.logits[..., columns], public.outputs[f"train/{batch}/logits_cols"][: len(with_image)])
    if without:
        output = vlm.model(ids[without], labels=labels[without])
        loss, count = loss + output.loss_sum, count + output.num_labels
    loss = loss / count
    assert int(count) == expected["num_valid_labels"]
    assert float(loss.detach()) == pytest.approx(expected["loss"], abs=TOLERANCE)
    loss.backward()
    named = {f"projector.{name}": p for name, p in vlm.model.projector.named_parameters()}
    named |= {f"llm_backbone.llm.{name}": p for name, p in vlm.model.llm.named_parameters()}
    assert expected["grad_norms"].keys() <= named.keys()
    for name, norm in expected["grad_norms"].items():
        gradient = named[name].grad
        assert float(0 if gradient is None else gradient.norm()) == pytest.approx(norm, rel=TOLERANCE, abs=TOLERANCE)


def test_run_without_its_language_model_must_be_told_where_it_is(
    small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As the stage align leaves it: only the projector is stored."""
    write_public_run(small_model, tokenizer.file, tmp_path)
    file = tmp_path / "checkpoints" / "latest-checkpoint.pt"
    parts = torch.load(file, weights_only=True)["model"]
    torch.save({"model": {"projector": parts["projector"]}}, file)
    vision, llm = (yaml.safe_load((tmp_path / f"{part}.yaml").read_text()) for part in ("vision", "llm"))
    for tower in vision["towers"]:
        tower["weights"] = str(tmp_path / tower["weights"])
    llm["tokenizer"] = str(tokenizer.file)
    with pytest.raises(ConfigError, match=r"latest-checkpoint\.pt holds no language model.*llm\.weights: a file"):
        cobra.load(tmp_path, device="cpu", vision=vision, llm=llm)
    torch.save(parts["llm_backbone"], tmp_path / "llm.pt")
    llm["weights"] = str(tmp_path / "llm.pt")
    found = cobra.load(tmp_path, device="cpu", vision=vision, llm=llm).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in small_model.state_dict().items())


def test_public_runs_that_lack_a_file_are_told_so(public: PublicRun, tmp_path: Path) -> None:
    run = shutil.copytree(public.folder, tmp_path / "run")
    checkpoint = run / "checkpoints" / "latest-checkpoint.pt"
    (run / "config.json").rename(run / "other.json")
    with pytest.raises(CheckpointError, match=r"run of the public release, but lacks config\.json; fetch it"):
        cobra.load(run)
    (run / "other.json").rename(run / "config.json")
    checkpoint.rename(checkpoint.with_name("step-7.pt"))
    with pytest.raises(CheckpointError, match=r"lacks checkpoints/latest-checkpoint\.pt; .*or give the checkpoint"):
        cobra.load(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"nor a run of the public release \(config.json \+ checkpoints/latest"):
        cobra.load(run)


@pytest.fixture
def named(public: PublicRun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder, for commands that take no overrides: its ids stand for the fixture's small parts."""
    monkeypatch.setitem(VISION, VISION_ID, public.vision["towers"])
    monkeypatch.setitem(LLMS, LLM_ID, LLMS[LLM_ID] | public.llm)
    return public.folder


def test_public_run_is_evaluated(public: PublicRun, named: Path, tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    paths = PathsConfig(results=str(tmp_path / "results"))
    config = EvaluateConfig(paths=paths, load=str(named), limit=6, batch_size=4, device="cpu")
    benchmark = EasyVQA(folder=str(tmp_path / "easyvqa"))
    scores = evaluate(config, benchmark)
    folder = tmp_path / "results" / "easyvqa" / named.name
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == scores.overall.total == 6
    asked = {question.id: question for question in benchmark.questions()}
    vlm = public.load()
    for row in rows:
        question = asked[row["question_id"]]
        assert row["prediction"] == vlm.generate(question.image, question.text, max_new_tokens=benchmark.max_new_tokens)
    assert evaluate(config, benchmark) == scores
    assert json.loads((folder / "results.json").read_text())["asked_now"] == 0


def test_public_run_is_evaluated_with_parts_named_by_the_command(public: PublicRun, tmp_path: Path) -> None:
    """Its ids stand for nothing here, so that `vision=` and `llm=` must have reached fingerprint and model."""
    pytest.importorskip("easy_vqa")
    vision = tmp_path / "vision.yaml"
    vision.write_text(yaml.safe_dump(public.vision))
    llm = ", ".join(f"{key}: {value}" for key, value in public.llm.items())
    settings = [f"load={public.folder}", f"vision={vision}", f"llm={{{llm}}}", f"output={tmp_path}", "limit=6"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("evaluate", [*settings, "benchmark=easyvqa", "device=cpu"])
    with open_dict(composed):
        del composed.benchmark
    benchmark = EasyVQA(folder=str(tmp_path / "easyvqa"))
    evaluate(as_config(EvaluateConfig, composed), benchmark)
    asked, vlm = {question.id: question for question in benchmark.questions()}, public.load()
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        question = asked[row["question_id"]]
        assert row["prediction"] == vlm.generate(question.image, question.text, max_new_tokens=benchmark.max_new_tokens)


def test_training_starts_from_a_public_run(
    public: PublicRun,
    named: Path,
    tiny_config: Callable[..., PretrainConfig],
    small_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given as a folder, or by its place below COBRA_WEIGHTS."""
    monkeypatch.setenv("COBRA_WEIGHTS", str(tmp_path))
    (tmp_path / "released").symlink_to(named)
    settings = ["train.max_steps=1", "train.learning_rate=1e-30", "parallel.precision=fp32"]
    expected = public.load().model.state_dict()
    for i, name in enumerate((str(named), "released")):
        config = tiny_config(*small_run, *settings, f"run.name=run{i}", f"init_from={name}")
        config = replace(config, model=replace(public_config(named, None, None), max_length=64))
        found = cobra.load(pretrain(config), device="cpu").model.state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():  # the rate is too small to move anything but an exact 0
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-20)
