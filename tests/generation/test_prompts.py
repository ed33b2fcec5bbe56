"""Prompts of text and images in any order, and lists of any mix, against passes over the whole sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cobra
from cobra import Prompt
from cobra.api import Pixels
from cobra.errors import ConfigError, DataError, ShapeError
from cobra.generation.engine import start_state
from cobra.models.vlm import CobraVLM
from cobra.text.tokenizer import Tokenizer

from .models import shaken

COUNT = 8


@pytest.fixture
def vlm(small_model: CobraVLM, tokenizer: Tokenizer) -> cobra.Cobra:
    shaken(small_model.llm)
    return cobra.Cobra(small_model.requires_grad_(False), tokenizer, "small")


@pytest.fixture
def paths(small_data: Any) -> list[Path]:
    return [small_data.image(n) for n in range(3)]


@torch.no_grad()
def whole_pass(vlm: cobra.Cobra, *pieces: str | Path) -> str:
    """Greedy answer to pieces as the language model sees them, the frame of the question included."""
    parts = []
    for piece in pieces:
        if isinstance(piece, str):
            parts.append(vlm.model.llm.embed(torch.tensor([vlm.tokenizer.encode(piece)])))
        else:
            views = vlm.model.vision.transform(Image.open(piece))
            parts.append(vlm.model.embed_images([view[None] for view in views]))
    sequence, answer = torch.cat(parts, dim=1), []
    while len(answer) < COUNT:
        token = int(vlm.model.llm.head(vlm.model.llm(sequence)[0][0, -1:])[0, : len(vlm.tokenizer)].argmax())
        if token == vlm.tokenizer.end_id:
            break
        answer.append(token)
        sequence = torch.cat([sequence, vlm.model.llm.embed(torch.tensor([[token]]))], dim=1)
    return vlm.tokenizer.decode(answer).strip()


def ask(vlm: cobra.Cobra, image: Any, prompt: Any) -> Any:
    return vlm.generate(image, prompt, max_new_tokens=COUNT)


def test_images_are_read_where_they_stand(vlm: cobra.Cobra, paths: list[Path]) -> None:
    before, after = vlm.prompt.before, vlm.prompt.after
    a, b, c = paths
    cases = {
        Prompt("is", a, "like", b, "?"): (f"{before}is", a, "like", b, f"?{after}"),
        Prompt("is", b, "like", a, "?"): (f"{before}is", b, "like", a, f"?{after}"),
        Prompt(a, b, c, " what is it? "): (before, a, b, c, f" what is it?{after}"),
        Prompt("what is it?", a): (f"{before}what is it?", a, after),
        Prompt("what ", "is it?", a): (f"{before}what is it?", a, after),
        Prompt(c): (before, c, after),
    }
    found = [ask(vlm, None, prompt) for prompt in cases]
    assert found == [whole_pass(vlm, *pieces) for pieces in cases.values()]
    scores = {tuple(vlm.score(None, prompt, ["Yes", "No"])) for prompt in cases}
    assert len({*found}) > 2 and len(scores) == 5  # order and place matter; two of the cases are the same
    assert ask(vlm, None, list(cases)) == found
    streamed = ["".join(vlm.stream(None, prompt, max_new_tokens=COUNT)) for prompt in cases]
    assert streamed == found


def test_an_image_may_come_before_such_a_prompt(vlm: cobra.Cobra, paths: list[Path]) -> None:
    prompt = Prompt("is it like", paths[1], "?")
    expected = whole_pass(vlm, paths[0], f"{vlm.prompt.before}is it like", paths[1], f"?{vlm.prompt.after}")
    assert ask(vlm, paths[0], prompt) == ask(vlm, vlm.encode_image(paths[0]), prompt) == expected
    assert ask(vlm, paths[:2], prompt) == [expected, ask(vlm, paths[1], prompt)]


def test_every_kind_of_image_may_stand_in_a_prompt(vlm: cobra.Cobra, paths: list[Path]) -> None:
    image = Image.open(paths[0])
    kinds = [image, np.asarray(image), vlm.prepare_image(paths[0])]
    assert isinstance(kinds[-1], Pixels)
    expected = ask(vlm, None, Prompt("is ", paths[0], "red?"))
    assert [ask(vlm, None, Prompt("is ", kind, "red?")) for kind in kinds] == [expected] * 3


def test_text_alone_is_an_ordinary_prompt(vlm: cobra.Cobra, paths: list[Path]) -> None:
    for text in (" what <image>is it? ", "<image>what is it?"):
        assert ask(vlm, paths[0], Prompt(text)) == ask(vlm, paths[0], text)
        assert Prompt(text).framed(vlm.prompt) == [vlm.prompt.question(text)]


def test_lists_may_mix_everything(vlm: cobra.Cobra, paths: list[Path]) -> None:
    images = [paths[0], None, paths[1], None, vlm.prepare_image(paths[2])]
    prompts = ["what is it?", "what is it?", Prompt("like", paths[2], "?"), Prompt(paths[0], "red?"), "red?"]
    one_by_one = [ask(vlm, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert ask(vlm, images, prompts) == one_by_one
    assert one_by_one[1] == whole_pass(vlm, vlm.prompt.question("what is it?"))
    assert ask(vlm, [None, paths[0]], "what is it?") == [one_by_one[1], one_by_one[0]]
    assert ask(vlm, [None, None], prompts[3:4]) == [one_by_one[3]] * 2
    scores = vlm.score(images, prompts, ["Yes", "No"])
    for image, prompt, row in zip(images, prompts, scores, strict=True):
        assert vlm.score(image, prompt, ["Yes", "No"]) == pytest.approx(row, rel=1e-4)


def test_sampled_answers_of_a_mix_are_their_own(vlm: cobra.Cobra, paths: list[Path]) -> None:
    images, prompts = [None, paths[0]], [Prompt("is", paths[1], "red?"), "what is it?"]
    options: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": COUNT}
    answers = vlm.generate(images, prompts, seed=4, **options)
    assert answers == [vlm.generate(images[row], prompts[row], seed=4 + row, **options) for row in range(2)]


def test_wrong_prompts_are_refused(vlm: cobra.Cobra, paths: list[Path], tmp_path: Path) -> None:
    state = vlm.encode_image(paths[0])
    for error, message, call in (
        (ConfigError, "no pieces", lambda: Prompt()),
        (ShapeError, "no state, not ImageState", lambda: ask(vlm, None, Prompt("is", state, "?"))),
        (ShapeError, "not list", lambda: ask(vlm, None, Prompt("is", paths, "?"))),
        (ShapeError, "not NoneType", lambda: ask(vlm, None, Prompt("is", None, "?"))),
        (DataError, "absent", lambda: ask(vlm, None, Prompt("is", tmp_path / "absent.png", "?"))),
        (ShapeError, "2 images and 3 prompts", lambda: ask(vlm, [None, None], ["a", "b", "c"])),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_start_of_a_text_is_a_state_like_any_other(small_model: CobraVLM, dtype: torch.dtype) -> None:
    llm = small_model.llm.to(dtype)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        start = start_state(llm)
        hidden, after = llm(llm.embed(ids), state=start)
        expected, after_expected = llm(llm.embed(ids))
        stepped = llm.step(ids[:, 0], after)[1]
    assert start.describe() == after.describe() == after_expected.describe() == stepped.describe()
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
