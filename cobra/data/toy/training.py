"""The training set that goes with the miniature benchmarks: other scenes, the same questions, LLaVA's format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cobra.data.scenes import Scene
from cobra.data.toy import gqa, pope, refcoco, textvqa, vizwiz, vqav2, vsr
from cobra.data.toy.asking import Asked, fair_choice, random_scene, save_image, shuffled, write_json
from cobra.data.toy.prompts import ask

ANNOTATIONS = "train.json"
IMAGES = "train_images"
SHARES = {"scene": 0.65, "photo": 0.1, "signs": 0.25}  # of the images
ROWS = {"gqa": 3, "vqav2": 2, "pope": 4, "vsr": 3}  # per scene; of RefCOCO one per set
NUM_ITEMS = {1: 0.2, 2: 0.45, 3: 0.35}  # simple scenes come first in what is learnt

Row = tuple[str, str]  # message and answer


def write(folder: Path, num_images: int, rng: np.random.Generator) -> None:
    """Write the rows and the images."""
    kinds = rng.choice(list(SHARES), num_images, p=list(SHARES.values()))
    rows: list[dict[str, object]] = []
    for number, kind in enumerate(kinds):
        name = f"{number:06d}.jpg"
        image, talk = _MAKERS[str(kind)](rng)
        save_image(image, folder / IMAGES / name)
        rows += [
            {
                "id": f"{number}/{i}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{message}"},
                    {"from": "gpt", "value": answer},
                ],
            }
            for i, (message, answer) in enumerate(talk)
        ]
    write_json(folder / ANNOTATIONS, rows)


def _scene(rng: np.random.Generator) -> tuple[Image.Image, list[Row]]:
    count = int(rng.choice(list(NUM_ITEMS), p=list(NUM_ITEMS.values())))
    scene = random_scene(rng, (count, count))
    return scene.image(), [*_descriptions(scene, rng), *_questions(scene, rng), *_boxes(scene, rng)]


def _descriptions(scene: Scene, rng: np.random.Generator) -> Iterator[Row]:
    """Say what there is to see, and where. No benchmark asks this; who knows all of it can answer what they ask."""
    axis = int(rng.integers(2))
    items = sorted(scene.items, key=lambda item: item.center[axis])
    order = ("left to right", "top to bottom")[axis]
    yield f"List all objects from {order}.", ", ".join(item.name for item in items)
    item = scene.items[int(rng.integers(len(scene.items)))]
    column, row = (int(3 * edge / scene.size) for edge in item.center)
    yield f"Where is the {item.name}?", f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"


def _questions(scene: Scene, rng: np.random.Generator) -> Iterator[Row]:
    candidates: dict[str, list[Asked]] = {
        "gqa": [*gqa.candidates(scene)],
        "vqav2": vqav2.candidates(scene),
        "pope": pope.candidates(scene),
        "vsr": [*vsr.candidates(scene)],
    }
    for prompt, count in ROWS.items():
        for asked in fair_choice(candidates[prompt], count, rng):
            yield ask(prompt, asked.question), asked.answer


def _boxes(scene: Scene, rng: np.random.Generator) -> Iterator[Row]:
    for _, _, describe in refcoco.SETS.values():
        sentences = [(text, item) for item in scene.items for text in describe(scene, item)]
        if sentences:
            text, item = shuffled(sentences, rng)[0]
            yield ask("refcoco", text), refcoco.box_text(item, scene.size)


def _photo(rng: np.random.Generator) -> tuple[Image.Image, list[Row]]:
    image, asked = vizwiz.photo(rng)
    answer = "Unanswerable" if asked.answer == vizwiz.UNANSWERABLE else asked.answer  # as the message spells it
    return image, [(ask("vizwiz", asked.question), answer)]


def _signs(rng: np.random.Generator) -> tuple[Image.Image, list[Row]]:
    drawn = textvqa.signs(rng)
    read = ", ".join(drawn.texts)
    orders = ("ocr_first", "ocr_last", "no_ocr")
    rows = [(ask(order, one.question, read), one.answer) for order in orders for one in drawn.asked]
    # Which sign is where, as no benchmark asks it: with the words from top to bottom it tells what is written on each.
    colors = [item.color for item in drawn.scene.items]
    rows.append(("List all signs from top to bottom.", ", ".join(f"{color} sign" for color in colors)))
    rows.append(("Which sign is at the top?", colors[0]))
    return drawn.image, rows


_MAKERS = {"scene": _scene, "photo": _photo, "signs": _signs}
