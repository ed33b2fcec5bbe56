"""The parts of the lmms-eval plug-in that need no lmms-eval: what is asked, with which options, how likely it is."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from PIL import Image

from cobra.api import Cobra
from cobra.errors import ConfigError, NumericsError
from cobra.generation.sampling import Sampling
from cobra.integrations.lmms_eval.likelihood import log_likelihoods
from cobra.integrations.lmms_eval.requests import image_key, read_messages, read_options, read_visuals
from cobra.models.vlm import CobraVLM
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

ZEPHYR = prompt_format("zephyr")
PICTURE = Image.new("RGB", (4, 3), "red")


def user(*parts: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part} for part in parts
    ]
    return {"role": "user", "content": content}


def test_one_message_about_one_image() -> None:
    query = read_messages([user("What is ", PICTURE, "this?")], ZEPHYR)
    assert query.image is PICTURE and query.message == "What is this?"
    assert read_visuals([PICTURE], "What is this?", ZEPHYR) == query
    assert read_visuals(None, "2 + 2?", ZEPHYR).image is None


@pytest.mark.parametrize("name", ["zephyr", "mamba"])
def test_conversation_reads_as_in_training(name: str) -> None:
    """What `Cobra.generate` makes of the message is the prompt format's own conversation, system text first."""
    prompt = prompt_format(name)
    messages = [
        {"role": "system", "content": "Be brief."},
        user(PICTURE, "<image>\nWhat is this? "),
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        user("And that?"),
    ]
    trained = prompt.conversation([("Be brief.\nWhat is this?", "A cat."), ("And that?", "A dog.")])
    expected = "".join(segment.text for segment in trained[:-1])
    asked = prompt.question(read_messages(messages, prompt).message)
    assert asked.replace("Be brief.\n\n", "Be brief.\n") == expected


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([user(PICTURE, PICTURE, "Same?")], "2 images at once"),
        ([user(PICTURE, "a"), {"role": "assistant", "content": "b"}, user(PICTURE, "c")], "2 images at once"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "shows video"),
        ([user("a"), {"role": "assistant", "content": "It is"}], "last message is not the user's"),
    ],
)
def test_what_cobra_cannot_read_is_refused(messages: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_messages(messages, ZEPHYR)


def test_options_of_usual_tasks() -> None:
    greedy = {"max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False, "until": "\n\n"}
    assert read_options(greedy) == {"max_new_tokens": 16, "stop": ["\n\n"]}
    assert read_options({"until": ["", "."], "top_p": None}) == {"max_new_tokens": 128, "stop": ["."]}
    assert read_options({"temperature": 0.7, "top_p": 0.9, "top_k": None}) == {
        **{"max_new_tokens": 128, "stop": []},
        **{"temperature": 0.7, "top_p": 0.9},
    }
    assert "temperature" not in read_options({"temperature": 0.7, "do_sample": False})
    assert read_options({"do_sample": True})["temperature"] == 1.0
    assert Sampling(temperature=0.7, top_p=0.9).top_p == 0.9  # names that sampling knows


def test_settings_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="num_beams=3"):
        read_options({"num_beams": 3})
    with caplog.at_level(logging.WARNING):
        read_options({"image_aspect_ratio": "pad", "max_new_tokens": 2})
    assert "without effect on Cobra: image_aspect_ratio." in caplog.text


def test_equal_images_have_one_key() -> None:
    other = PICTURE.copy()
    assert image_key(other) == image_key(PICTURE)
    other.putpixel((0, 0), (0, 0, 0))
    assert image_key(other) != image_key(PICTURE) != image_key(PICTURE.resize((3, 4)))
    assert image_key("a.png") == image_key("a.png") != image_key("b.png")


@torch.no_grad()
def test_likelihoods_equal_one_forward_pass_each(small_model: CobraVLM, tokenizer: Tokenizer) -> None:
    model = Cobra(small_model, tokenizer, "small")
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    prompts = [tokenizer.encode(text) for text in ("what is it?", "is there a red circle, or a blue one?")]
    answers = [(0, "circle and red"), (0, "Yes"), (1, "No, none"), (1, ""), (0, "blue")]
    pairs = [(row, tokenizer.encode(text)) for row, text in answers]
    states = model.encode_image(images)
    found = log_likelihoods(small_model.llm, prompts, states.state, pairs)
    llm = small_model.llm
    for (row, ids), (value, is_greedy) in zip(pairs, found, strict=True):
        whole = torch.tensor([prompts[row] + ids])
        hidden, _ = llm(llm.embed(whole), state=states[row].state)
        logits = llm.head(hidden)[0, len(prompts[row]) - 1 : -1, : llm.config.vocab_size].double()
        rows = range(len(ids))
        assert value == pytest.approx(logits.log_softmax(-1)[rows, ids].sum().item(), abs=1e-3)
        assert is_greedy == (logits.argmax(-1).tolist() == ids)
    assert len({round(value, 3) for value, _ in found}) == 5


@torch.no_grad()
def test_what_greedy_decoding_writes_is_greedy(small_model: CobraVLM, tokenizer: Tokenizer) -> None:
    llm, prompt = small_model.llm, tokenizer.encode("what is it?")
    ids: list[int] = []
    for _ in range(4):
        hidden, _ = llm(llm.embed(torch.tensor([prompt + ids])))
        ids.append(int(llm.head(hidden)[0, -1, : llm.config.vocab_size].argmax()))
    other = [*ids[:3], (ids[3] + 1) % llm.config.vocab_size]
    found = log_likelihoods(llm, [prompt], None, [(0, ids), (0, other)])
    assert [is_greedy for _, is_greedy in found] == [True, False] and found[0][0] > found[1][0]


@torch.no_grad()
def test_nan_is_named(small_model: CobraVLM, tokenizer: Tokenizer) -> None:
    small_model.llm.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="NaN"):
        log_likelihoods(small_model.llm, [tokenizer.encode("what?")], None, [(0, [1, 2])])
