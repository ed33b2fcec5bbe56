"""Transformers models through the evaluation's interface, against transformers' own use of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cobra.errors import CheckpointError, ConfigError, NumericsError, ShapeError
from cobra.eval.models import open_model
from cobra.integrations.transformers import TransformersModel, load_transformers

QUESTIONS = ["what is it?", "is there something that is larger than the red one?", "a", "Yes or No?", "", " b \n"]


@pytest.fixture(scope="module")
def model(llava: Path) -> TransformersModel:
    return load_transformers(str(llava), device="cpu")


def own_inputs(llava: Path, picture: Path, question: str) -> Any:
    """One conversation as transformers' documentation prepares it."""
    from transformers import AutoProcessor

    image = {"type": "image", "image": Image.open(picture).convert("RGB")}
    conversation = [{"role": "user", "content": [image, {"type": "text", "text": question.strip()}]}]
    return AutoProcessor.from_pretrained(llava).apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.fixture(scope="module")
def own_model(llava: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()


def test_batched_answers_equal_transformers_own(
    model: TransformersModel, own_model: Any, llava: Path, pictures: list[Path]
) -> None:
    answers = model.generate(model.encode_image(pictures), QUESTIONS, max_new_tokens=7)
    for picture, question, answer in zip(pictures, QUESTIONS, answers, strict=True):
        inputs = own_inputs(llava, picture, question)
        ids = own_model.generate(**inputs, do_sample=False, max_new_tokens=7)[0, inputs["input_ids"].shape[1] :]
        assert answer == model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(set(answers)) > 4


def test_answer_depends_on_its_own_image(model: TransformersModel, pictures: list[Path]) -> None:
    images = model.encode_image(pictures)
    answers = model.generate(images[[0, 1, 2, 3, 4, 5, 0]], ["what is it?"] * 7, max_new_tokens=7)
    assert answers[6] == answers[0] and len(set(answers)) > 3


def test_probabilities_equal_a_forward_pass(
    model: TransformersModel, own_model: Any, llava: Path, pictures: list[Path]
) -> None:
    rows = model.score(model.encode_image(pictures), QUESTIONS, ["Yes", "No", "True"])
    ids = [model.processor.tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in ("Yes", "No", "True")]
    for picture, question, row in zip(pictures, QUESTIONS, rows, strict=True):
        with torch.no_grad():
            logits = own_model(**own_inputs(llava, picture, question)).logits[0, -1]
        everything = torch.softmax(logits.double(), dim=0)[ids]
        assert row == pytest.approx((everything / everything.sum()).tolist(), abs=1e-5)
        assert max(row) - min(row) > 0.05


@pytest.mark.parametrize(
    ("end", "token"),
    [(" ASSISTANT:", "ĠYes"), (" ASSISTANT:\n", "Yes"), ("</s>", "Yes")],
    ids=["text", "new line", "special token"],
)
def test_choice_is_spelt_as_after_the_template(
    model: TransformersModel, end: str, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = model.processor.chat_template.replace(" ASSISTANT:", f"{{{{ {end!r} }}}}")
    monkeypatch.setattr(model.processor, "chat_template", template)
    assert model.choice_ids(["Yes"]) == [model.processor.tokenizer.convert_tokens_to_ids(token)]


def test_choice_of_several_tokens_is_refused(model: TransformersModel, pictures: list[Path]) -> None:
    with pytest.raises(ConfigError, match="'Maybe' is not a single token"):
        model.choice_ids(["Yes", "Maybe"])
    with pytest.raises(ConfigError, match="'yes' is not a single token"):
        model.score(model.encode_image(pictures[:1]), ["is it?"], ["yes", "No"])


def test_model_without_a_chat_template(llava: Path, own_model: Any, pictures: list[Path]) -> None:
    model = load_transformers(str(llava), device="cpu")
    model.processor.chat_template = None
    inputs = model.processor(text="<image>\nwhat?", images=Image.open(pictures[0]), return_tensors="pt")
    ids = own_model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    expected = model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert model.generate(model.encode_image(pictures[:1]), ["what?"], max_new_tokens=5) == [expected]


def test_question_that_spells_the_image_token(model: TransformersModel, pictures: list[Path]) -> None:
    images = model.encode_image([pictures[0], pictures[0]])
    with_token, without = model.generate(images, ["<image>\nwhat?", "what?"], max_new_tokens=5)
    assert with_token == without


def test_sampling_of_a_generation_config_is_ignored(
    model: TransformersModel, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = model.encode_image(pictures)
    greedy = model.generate(images, QUESTIONS, max_new_tokens=7)
    for name, value in {"do_sample": True, "temperature": 50.0, "top_k": 40}.items():
        monkeypatch.setattr(model.model.generation_config, name, value)
    assert model.generate(images, QUESTIONS, max_new_tokens=7) == greedy


def test_dtype(llava: Path, pictures: list[Path]) -> None:
    model = load_transformers(str(llava), device="cpu", dtype="bfloat16")
    assert model.model.dtype == torch.bfloat16
    assert len(model.generate(model.encode_image(pictures), QUESTIONS, max_new_tokens=2)) == 6


def test_nan_is_named(llava: Path, pictures: list[Path]) -> None:
    model = load_transformers(str(llava), device="cpu")
    with torch.no_grad():
        model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="NaN"):
        model.score(model.encode_image(pictures[:1]), ["is it?"], ["Yes", "No"])


def test_bad_names_and_arguments(model: TransformersModel, llava: Path, tmp_path: Path, pictures: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"transformers:.* cannot be loaded"):
        load_transformers(str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match="float16"):
        load_transformers(str(llava), device="cpu", dtype="float16")
    with pytest.raises(ConfigError, match="no effect"):
        open_model(f"transformers:{llava}", device="cpu", llm={"prompt": "mamba"})
    with pytest.raises(ShapeError, match="2 images and 1 prompts"):
        model.generate(model.encode_image(pictures[:2]), ["a"], max_new_tokens=1)


def test_pickled_weights_are_not_read(llava: Path, tmp_path: Path, model: TransformersModel) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in llava.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(model.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_transformers(str(folder), device="cpu")
