"""VizWiz in miniature: one question about a photo of one object; a third of them cannot be answered.

Either the photo is blurred beyond recognition, or the question is about something that it does not show.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from cobra.data.scenes import SHAPES, Scene
from cobra.data.toy.asking import COLORS, SIZE, Asked, random_scene, save_image, shuffled, ten_answers, write_json

FOLDER = "vizwiz"
UNANSWERABLE = "unanswerable"
BLUR = SIZE / 4  # pixels


def photo(rng: np.random.Generator) -> tuple[Image.Image, Asked]:
    """Take a photo and ask one question about it."""
    item = (scene := random_scene(rng, (1, 1))).items[0]
    questions = {"What color is this?": item.color, "What shape is this?": item.shape, "What is this?": item.name}
    for shape in SHAPES:
        questions[f"What color is the {shape}?"] = item.color if shape == item.shape else UNANSWERABLE
    is_blurred = bool(rng.random() < 1 / 6)
    wants_answer = is_blurred or rng.random() < 4 / 5
    fitting = [one for one, answer in questions.items() if (answer != UNANSWERABLE) == wants_answer]
    question = shuffled(fitting, rng)[0]
    if is_blurred:
        return blurred(scene), Asked(question=question, answer=UNANSWERABLE, kind="other")
    return scene.image(), Asked(question=question, answer=questions[question], kind="other")


def blurred(scene: Scene) -> Image.Image:
    """Take a photo that shows nothing but a hint of colour."""
    return scene.image().filter(ImageFilter.GaussianBlur(BLUR))


def write(folder: Path, num_images: int, rng: np.random.Generator) -> None:
    """Write val.json and the photos."""
    rows: list[dict[str, object]] = []
    for number in range(num_images):
        name = f"VizWiz_val_{number:08d}.jpg"
        image, asked = photo(rng)
        save_image(image, folder / "val_images" / name)
        is_answerable = asked.answer != UNANSWERABLE
        others = [UNANSWERABLE, *COLORS] if is_answerable else ["nothing", *SHAPES]
        said = ten_answers(asked.answer, others, rng)
        sure = rng.choice(["yes", "maybe", "no"], len(said), p=[0.7, 0.2, 0.1]).tolist()
        rows.append(
            {
                "image": name,
                "question": asked.question,
                "answers": [
                    {"answer": answer, "answer_confidence": confidence}
                    for answer, confidence in zip(said, sure, strict=True)
                ],
                "answer_type": "other" if is_answerable else UNANSWERABLE,
                "answerable": int(is_answerable),
            }
        )
    write_json(folder / "val.json", rows)
