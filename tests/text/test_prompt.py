"""Prompt formats against those of the public release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cobra.config import LLMConfig
from cobra.errors import ConfigError
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

NAMES = (
    "single",
    "single_vqa_newline",
    "single_image_tag",
    "two_turn_closed",
    "empty_gpt",
    "three_turn_open",
    "four_turn",
)


@pytest.fixture(params=["zephyr", "mamba"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def expected(assets: Path, name: str) -> dict[str, Any]:
    return json.loads((assets / "fixtures" / "public-cobra-tiny" / "prompts.json").read_text())[name]


@pytest.mark.parametrize("conversation", NAMES)
def test_turns_are_wrapped_as_in_the_public_release(expected: dict[str, Any], name: str, conversation: str) -> None:
    prompt, case = prompt_format(name), expected[conversation]
    wrapped = [
        prompt.question(text, is_first=i == 0) if role == "human" else prompt.answer(text)
        for i, (role, text) in enumerate(case["turns"])
    ]
    assert wrapped == case["wrapped"]
    assert "".join(wrapped) == case["prompt"]


@pytest.mark.parametrize("conversation", NAMES)
def test_prompt_ids_equal_the_public_release(
    assets: Path, expected: dict[str, Any], name: str, conversation: str
) -> None:
    neox = Tokenizer(assets / "data" / "gpt-neox-tokenizer" / "tokenizer.json")
    case = expected[conversation]
    assert neox.encode(case["prompt"]) == case["input_ids"]
    if len(case["turns"]) == 1:
        assert neox.encode(prompt_format(name).question(case["turns"][0][1])) == case["input_ids"]


def test_conversation_marks_the_answers(name: str) -> None:
    prompt = prompt_format(name)
    segments = prompt.conversation([("<image>\nhi", " hello "), ("bye", "")])
    assert [segment.is_answer for segment in segments] == [False, True, False, True]
    assert [segment.text for segment in segments] == [
        prompt.question("hi"),
        "hello<|endoftext|>",
        "\n" + prompt.question("bye"),
        " <|endoftext|>",
    ]


def test_caption_is_the_first_answer_alone(name: str) -> None:
    (segment,) = prompt_format(name).caption([("describe", "a red circle"), ("more?", "no")])
    assert segment.is_answer and segment.text == "a red circle<|endoftext|>"


def test_template_is_a_format() -> None:
    prompt = prompt_format("Q: {question}\nA: ")
    segments = prompt.conversation([("<image>\nhi {question}", "hello"), ("bye", "")])
    wrapped = "Q: hi {question}\nA: hello<|endoftext|>\nQ: bye\nA:  <|endoftext|>"
    assert "".join(segment.text for segment in segments) == wrapped
    assert [segment.text for segment in segments if segment.is_answer] == ["hello<|endoftext|>", " <|endoftext|>"]


@pytest.mark.parametrize(("prompt", "words"), [("zephir", "'zephyr'"), ("{question}{question}", "once")])
def test_format_that_is_none_is_refused_with_the_settings(prompt: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.llm\.prompt.*{words}"):
        LLMConfig(d_model=8, num_layers=1, vocab_size=8, tokenizer="any", prompt=prompt)


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="zephyr, mamba"):
        prompt_format("vicuna")
