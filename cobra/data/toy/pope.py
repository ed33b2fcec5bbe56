"""POPE in miniature: three present and three absent objects in each of three splits, on the images of VQA-v2.

An object is a colour with a shape. As POPE does, the random split draws absent objects, the popular one takes those
that most images have, the adversarial one those that share most images with the present objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cobra.data.scenes import Scene
from cobra.data.toy.asking import KINDS, Asked, shuffled, write_json_lines

FOLDER = "pope"
NUM_OBJECTS = 3  # present ones, and as many absent ones
NAMES = tuple(f"{color} {shape}" for color, shape in KINDS)


def frequencies() -> np.ndarray:
    """How often each kind of object is drawn: some are popular, as people and chairs are in COCO."""
    weights = 1 / np.arange(4, 4 + len(KINDS))
    return weights / weights.sum()


def candidates(scene: Scene) -> list[Asked]:
    """Every object, present or not. Answers with a capital: their first token is compared."""
    present = {item.name for item in scene.items}
    return [
        Asked(question=question(name), answer="Yes" if name in present else "No", kind=str(name in present))
        for name in NAMES
    ]


def question(name: str) -> str:
    """The one question of POPE."""
    return f"Is there a {name} in the image?"


def write(folder: Path, scenes: Mapping[str, Scene], rng: np.random.Generator) -> None:
    """Write the three splits about these images, which another benchmark has written.

    Args:
        folder: where the splits go.
        scenes: by image name, with three or more objects each.
        rng: draws from them.
    """
    present = {image: {item.name for item in scene.items} for image, scene in scenes.items()}
    seen = {image: shuffled(sorted(names), rng)[:NUM_OBJECTS] for image, names in present.items()}
    counts = {name: sum(name in names for names in present.values()) for name in NAMES}

    def absent(split: str, image: str) -> list[str]:
        others = shuffled([name for name in NAMES if name not in present[image]], rng)
        if split == "popular":
            others.sort(key=lambda name: -counts[name])
        elif split == "adversarial":
            shared = {name: sum(len(present[image] & names) for names in present.values() if name in names)
                      for name in others}  # fmt: skip
            others.sort(key=lambda name: -shared[name])
        return others[:NUM_OBJECTS]

    for split in ("random", "popular", "adversarial"):
        asked = [
            (image, name, label)
            for image in scenes
            for pair in zip(seen[image], absent(split, image), strict=True)
            for name, label in zip(pair, ("yes", "no"), strict=True)
        ]
        rows = [
            {"question_id": number, "image": image, "text": question(name), "label": label}
            for number, (image, name, label) in enumerate(asked, start=1)
        ]
        write_json_lines(folder / f"coco_pope_{split}.json", rows)
