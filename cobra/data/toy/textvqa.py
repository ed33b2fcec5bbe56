"""TextVQA in miniature: signs with a word on them, and what an OCR system read from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cobra.data.scenes import Scene, scattered_scene
from cobra.data.toy.asking import (
    COLORS,
    SIZE,
    Asked,
    distinct_numbers,
    save_image,
    shuffled,
    ten_answers,
    write_json,
    write_json_lines,
)

FOLDER = "text-vqa"
WORDS: tuple[str, ...] = ("bus", "cat", "cup", "dog", "hat", "key", "map", "pen", "sun", "tea")
NUM_SIGNS = 2
SIDES = (0.34, 0.44)  # of a sign, as a share of the picture's side
FONT_SIZE = 12  # pixels
DARK = 110  # below this luminance white paint can be read better than black


@dataclass(frozen=True, kw_only=True)
class Signs:
    """A picture of signs from top to bottom, what is written on each, and its questions."""

    image: Image.Image
    scene: Scene
    texts: list[str]
    asked: list[Asked]


def signs(rng: np.random.Generator) -> Signs:
    """Draw signs of different colours with different words, and ask about each."""
    colors = shuffled(COLORS, rng)[:NUM_SIGNS]
    scene = scattered_scene(rng, [(color, "rectangle") for color in colors], SIZE, SIDES)
    scene = replace(scene, items=tuple(sorted(scene.items, key=lambda item: item.center[1])))
    texts = shuffled(WORDS, rng)[:NUM_SIGNS]
    image = scene.image()
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    asked: list[Asked] = []
    for item, text in zip(scene.items, texts, strict=True):
        red, green, blue = item.rgb
        is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < DARK
        pen.text(item.center, text, fill="white" if is_dark else "black", font=font, anchor="mm")
        asked.append(Asked(question=f"What is written on the {item.color} sign?", answer=text, kind="sign"))
    return Signs(image=image, scene=scene, texts=texts, asked=asked)


def write(folder: Path, num_images: int, rng: np.random.Generator) -> None:
    """Write annotations, the OCR file in the same order, and the images; one or two questions about each."""
    rows: list[dict[str, object]] = []
    ocr: list[dict[str, str]] = []
    for number in distinct_numbers(rng, num_images, 2**62):
        image_id = f"{number:016x}"
        drawn = signs(rng)
        save_image(drawn.image, folder / "train_val_images" / f"{image_id}.jpg")
        misread = ["unanswerable", *(word for word in WORDS if word not in drawn.texts)]
        for asked in shuffled(drawn.asked, rng)[: int(rng.integers(1, 2, endpoint=True))]:
            rows.append(
                {
                    "question": asked.question,
                    "image_id": image_id,
                    "image_classes": ["Sign"],
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "image_width": SIZE,
                    "image_height": SIZE,
                    "answers": ten_answers(asked.answer, misread, rng),
                    "question_tokens": asked.question.lower().strip("?").split(),
                    "question_id": 34_602 + len(rows),
                    "set_name": "val",
                }
            )
            text = f"{asked.question}\nReference OCR token: {', '.join(drawn.texts)}"
            ocr.append({"question_id": image_id, "image": f"{image_id}.jpg", "text": text, "category": "default"})
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", about | {"data": rows})
    write_json_lines(folder / "textvqa_val_v051_ocr.jsonl", ocr)
