"""Exported models in this process, where importing the integration has registered them: equal bits, equal logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import cobra
from cobra.config import ModelConfig, ProjectorConfig, TowerConfig, VisionConfig
from cobra.convert import convert
from cobra.errors import CheckpointError, ConfigError, DataError
from cobra.eval.fingerprint import model_fingerprint
from cobra.models.build import build_model, cast_parameters
from cobra.models.vlm import CobraVLM
from cobra.models.weights import save_model_folder
from cobra.text.prompt import IGNORE_INDEX
from cobra.text.tokenizer import Tokenizer
from cobra.train.run import _start_folder

transformers = pytest.importorskip("transformers")
QUESTIONS = ["what is it?", "is there something larger than the red one, or is there nothing?", ""]

_SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2}
_DINO = TowerConfig(
    timm="vit_small_patch14_reg4_dinov2", image_size=48, args=_SMALL | {"patch_size": 8}, weights="random"
)
# reads other pixels than the first, in another size, and computes buffers that no file holds
_EVA = TowerConfig(
    timm="eva02_tiny_patch14_224", image_size=24, layer=1, args=_SMALL | {"patch_size": 4}, weights="random"
)
VARIANTS = {
    "two views": (VisionConfig(towers=[_DINO, _EVA], resize="letterbox"), ProjectorConfig(kind="fused-ldpv2", grid=4)),
    "cropped": (VisionConfig(towers=[_EVA, _DINO], resize="resize-crop"), ProjectorConfig(kind="ldpv2")),
    "one tower": (VisionConfig(towers=[_DINO]), ProjectorConfig(kind="gelu-mlp")),
    "linear": (VisionConfig(towers=[_EVA, _DINO]), ProjectorConfig(kind="linear")),
}


def export(model: CobraVLM, tokenizer: Tokenizer, folder: Path, shard_size: str = "5GB") -> tuple[Any, Any]:
    """Export a model; return transformers' model and processor, loaded with the classes of this package."""
    from cobra.integrations.hf.export import write_hugging_face

    folder.mkdir()
    write_hugging_face(model, tokenizer.file, folder, shard_size=shard_size)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(theirs).__module__ == "cobra.integrations.hf.modeling_cobra"
    return theirs, transformers.AutoProcessor.from_pretrained(folder)


def messages(question: str, image: Any | None = None) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": question}]
    return [{"role": "user", "content": parts if image is None else [*parts, {"type": "image", "image": image}]}]


def inputs(processor: Any, questions: Sequence[str], images: Sequence[Any | None]) -> Any:
    chats = [messages(question, image) for question, image in zip(questions, images, strict=True)]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, processor_kwargs={"padding": True}, **options
    )


@torch.no_grad()
def our_logits(model: CobraVLM, tokenizer: Tokenizer, text: str, image: Path | None) -> Tensor:
    """Logits at every position of one row, image tokens included."""
    embedded = model.llm.embed(torch.tensor([tokenizer.encode(text)]))
    if image is not None:
        views = model.vision.transform(Image.open(image))
        embedded = torch.cat([model.embed_images([view[None] for view in views]), embedded], dim=1)
    return model.llm.head(model.llm(embedded)[0])[0, :, : model.config.llm.vocab_size]


@pytest.fixture
def theirs(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> tuple[Any, Any]:
    return export(small_model, tokenizer, tmp_path / "hf")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_part_gives_equal_logits_and_bits(
    variant: str, small_model_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path, pictures: list[Path]
) -> None:
    vision, projector = VARIANTS[variant]
    model = build_model(replace(small_model_config, vision=vision, projector=projector), seed=0)
    with torch.no_grad():
        model.llm.backbone.embedding.weight *= 25  # so that logits differ clearly from token to token
    hf, processor = export(model, tokenizer, tmp_path / "hf")
    given = inputs(processor, ["what is it?"], [str(pictures[0])])
    with torch.no_grad():
        logits = hf(**given).logits[0]
    num_tokens = model.config.llm.vocab_size
    expected = our_logits(model, tokenizer, "In: what is it?\nOut: ", pictures[0])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits[:, :num_tokens], expected, rtol=0, atol=1e-4)  # their scan sums in another order
    assert bool((logits[:, num_tokens:] == -torch.inf).all())  # the rows behind the vocabulary are no tokens
    save_model_folder(model, tokenizer.file, tmp_path / "ours")
    convert(str(tmp_path / "hf"), tmp_path / "back", "cobra")
    assert_equal_folders(tmp_path / "ours", tmp_path / "back")


def assert_equal_folders(expected: Path, found: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (expected, found))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
    assert (expected / "tokenizer.json").read_bytes() == (found / "tokenizer.json").read_bytes()
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (expected, found))
    assert first == second


def test_shards_and_16_bits_come_back(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cast_parameters(small_model, torch.bfloat16)
    hf, _ = export(small_model, tokenizer, tmp_path / "hf", shard_size="200KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    kinds = {name.rpartition("mixer.")[2]: parameter.dtype for name, parameter in hf.llm.named_parameters()}
    assert kinds["in_proj.weight"] == torch.bfloat16
    assert kinds["A_log"] == kinds["D"] == kinds["dt_proj.bias"] == torch.float32
    made_of = model_fingerprint(str(tmp_path / "hf"))
    save_model_folder(small_model, tokenizer.file, tmp_path / "ours")
    convert(str(tmp_path / "hf"), tmp_path / "back", "cobra")
    assert_equal_folders(tmp_path / "ours", tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "hf", "hf", overwrite=True)  # takes the old one's shards away
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert model_fingerprint(str(tmp_path / "hf"))["model"] != made_of["model"]  # evaluations tell files apart
    vlm = cobra.load(tmp_path / "hf", device="cpu")
    assert vlm.generate(None, "what?", max_new_tokens=2) is not None
    with pytest.raises(ConfigError, match="vision and llm have no effect"):
        cobra.load(tmp_path / "hf", llm={"prompt": "zephyr"})


def test_padding_on_the_left_is_exact_and_elsewhere_refused(
    theirs: tuple[Any, Any], small_model: CobraVLM, tokenizer: Tokenizer, pictures: list[Path]
) -> None:
    """Rows of different lengths, one of them without an image: logits and greedy tokens of each row alone."""
    hf, processor = theirs
    images = [*map(str, pictures[:2]), None]
    batch = inputs(processor, QUESTIONS, images)
    assert batch["attention_mask"].sum(dim=1).unique().numel() == 3 and batch["pixel_values"].shape[0] == 2
    with torch.no_grad():
        together = hf(**batch).logits[:, -1]
    ids = hf.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    for row, (question, image) in enumerate(zip(QUESTIONS, images, strict=True)):
        expected = our_logits(small_model, tokenizer, f"In: {question}\nOut: ", Path(image) if image else None)[-1]
        torch.testing.assert_close(together[row, : len(expected)], expected, rtol=0, atol=1e-4)
        alone = inputs(processor, [question], [image])
        own = hf.generate(**alone, max_new_tokens=6)[0, alone["input_ids"].shape[1] :]
        assert ids[row, : len(own)].tolist() == own.tolist()
    with pytest.raises(ValueError, match="Pad on the left"):
        hf(**{name: values if name == "pixel_values" else values.flip(1) for name, values in batch.items()})
    with pytest.raises(ValueError, match="Pad on the right"):
        hf.train()(**batch)
    hf.eval()
    with pytest.raises(ValueError, match="64 each"):
        hf(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(ValueError, match="places for image tokens; pass their pixel_values"):
        hf.generate(**{name: values for name, values in batch.items() if name != "pixel_values"})
    with torch.no_grad(), pytest.raises(ValueError, match="one token at a time"):
        state = hf(**batch, use_cache=True).cache_params
        hf(input_ids=batch["input_ids"][:, -2:], cache_params=state)  # text


def test_loss_and_its_gradient_with_padding_on_the_right(
    theirs: tuple[Any, Any], small_model: CobraVLM, tokenizer: Tokenizer, pictures: list[Path]
) -> None:
    hf, processor = theirs
    processor.tokenizer.padding_side = "right"
    batch = inputs(processor, QUESTIONS[:2], [str(file) for file in pictures[:2]])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, IGNORE_INDEX)
    labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    found = hf.train()(**batch, labels=labels).loss
    text = labels[:, small_model.num_image_tokens :]
    pixels = torch.stack([small_model.vision.transform(Image.open(file))[0] for file in pictures[:2]])
    output = small_model(text.clamp(min=0), pixels=pixels, labels=text)
    # theirs counts no label at a row's beginning either: the first text token is predicted from the last image token
    torch.testing.assert_close(found, output.loss, rtol=1e-4, atol=1e-5)
    found.backward()
    output.loss.backward()
    one, other = hf.projector.projector[0].weight.grad, small_model.projector.projector[0].weight.grad
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_exported_is_told(
    small_model: CobraVLM, tokenizer: Tokenizer, theirs: tuple[Any, Any], tmp_path: Path
) -> None:
    save_model_folder(small_model, tokenizer.file, tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"results go into the model card of to=hf"):
        convert(str(tmp_path / "ours"), tmp_path / "out", "public", results=tmp_path)
    convert(str(tmp_path / "ours"), tmp_path / "llm", "hf-mamba")
    with pytest.raises(CheckpointError, match="language model alone"):
        convert(str(tmp_path / "llm"), tmp_path / "out", "hf")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "fingerprint.json").write_text('{"model": "0123456789abcdef"}')
    with pytest.raises(DataError, match="results of other weights"):
        convert(str(tmp_path / "ours"), tmp_path / "out", "hf", results=tmp_path / "results")
    with pytest.raises(CheckpointError, match="Turn it back: cobra convert"):
        _start_folder(str(tmp_path / "hf"))
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "projector"}))
    with pytest.raises(CheckpointError, match="lacks 'projector'"):
        cobra.load(tmp_path / "hf")
    assert not (tmp_path / "out").exists()
