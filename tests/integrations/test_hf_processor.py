"""The exported processor: pixels and prompts as Cobra makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cobra.models.image import ImageTransform
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

DATA = {"mean": (0.5, 0.4, 0.3), "interpolation": "bicubic"}


def render(prompt: str, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    from cobra.integrations.hf.chat import chat_template

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.file))
    return theirs.apply_chat_template(messages, chat_template=chat_template(prompt_format(prompt)), tokenize=False)


def pictures() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (37, 52, 3), dtype=np.uint8))
    turned = noise.copy()
    turned.getexif()[0x0112] = 6
    alpha = noise.convert("RGBA")
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (37, 52), dtype=np.uint8)))
    grey = Image.fromarray(rng.integers(0, 65536, (20, 60), dtype=np.uint16))
    return {"rgb": noise, "turned": turned, "alpha": alpha, "16 bits": grey, "palette": noise.convert("P")}


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_pixels_are_the_same_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    from cobra.integrations.hf.image_processing_cobra import CobraImageProcessor

    ours = ImageTransform([(48, DATA), (24, DATA | {"interpolation": "bilinear"})], strategy)
    views = [{"size": view.size, "interpolation": view.interpolation, "fill": list(view.fill)} for view in ours.views]
    theirs = CobraImageProcessor(resize=strategy, views=views)
    for kind, picture in pictures().items():
        picture.save(tmp_path / "picture.png", exif=picture.getexif())
        for given in (picture, str(tmp_path / "picture.png")):
            pixels = theirs(images=[given])["pixel_values"]
            assert pixels.shape == (1, 3, 48, 72) and pixels.dtype == torch.uint8
            large, small = ours(picture)
            assert torch.equal(pixels[0, :, :, :48], large) and torch.equal(pixels[0, :, :24, 48:], small), kind


@pytest.mark.parametrize("prompt", ["zephyr", "mamba"])
def test_conversations_are_rendered_as_in_training(prompt: str, tokenizer: Tokenizer) -> None:
    form = prompt_format(prompt)
    turns = [(' what is "it"?\n', "A <image>cat. "), ("<image>Sure?", "  ")]
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    expected = "".join(segment.text for segment in form.conversation(turns))
    assert render(prompt, messages, tokenizer) == expected
    last = [{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "now?"}]
    messages.append({"role": "user", "content": last})
    assert render(prompt, messages, tokenizer) == "<image>" + expected + form.question("and now?", is_first=False)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert render(prompt, system, tokenizer) == form.question("Be brief.\nWhy?")


def test_other_conversations_are_refused(tokenizer: Tokenizer) -> None:
    for parts, reason in (([{"type": "image"}] * 2, "one image per"), ([{"type": "video"}], "no video")):
        with pytest.raises(Exception, match=reason):
            render("mamba", [{"role": "user", "content": parts}], tokenizer)
