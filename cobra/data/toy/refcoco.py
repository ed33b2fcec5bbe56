"""RefCOCO, RefCOCO+ and RefCOCOg in miniature: sentences that describe one object of a scene.

RefCOCO's sentences say where it is, RefCOCO+'s never do, RefCOCOg's are longer and name another object.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cobra.data.scenes import SHAPES, Item, Scene
from cobra.data.toy.asking import distinct_numbers, random_scene, save_image, shuffled, the_only, write_json
from cobra.data.toy.relations import DIRECTIONS, PHRASES, extreme

FOLDER = "refcoco"
SENTENCES_PER_OBJECT = 3
NUM_ITEMS = (2, 3)
STEP = 0.05  # of the edges in answers: an overlap of a half is easily reached
LARGER = 1.4  # times the area of every other object
WORDS = {
    "left of": ("left", "on the left", "leftmost"),
    "right of": ("right", "on the right", "rightmost"),
    "above": ("top", "at the top", "topmost"),
    "below": ("bottom", "at the bottom", "lowest"),
}


def by_place(scene: Scene, item: Item) -> list[str]:
    """Sentences with location words; without a place of its own, an object is named as RefCOCO+ does."""
    sentences: list[str] = []
    for direction, (short, where, most) in WORDS.items():
        if extreme(scene, direction) is item:
            sentences += [f"{short} {item.shape}", f"{item.name} {where}", f"{most} object", f"the {short} one"]
    return sentences or by_looks(scene, item)


def by_looks(scene: Scene, item: Item) -> list[str]:
    """Sentences without location words."""
    sentences = [item.name, f"the {item.name}"]
    if item.shape in the_only(scene, lambda item: item.shape):
        sentences.append(f"the {item.shape}")
    if item.color in the_only(scene, lambda item: item.color):
        sentences.append(f"the {item.color} one")
    if all(item.area >= LARGER * other.area for other in scene.items if other is not item):
        sentences.append("biggest object")
    return sentences


def by_neighbour(scene: Scene, item: Item) -> list[str]:
    """Longer sentences, which relate the object to another one."""
    return [
        f"a {item.name} that is {PHRASES[direction]} the {other.name}"
        for other in scene.items
        if other is not item
        for direction, holds in DIRECTIONS.items()
        if holds(item, other, scene.size)
    ]


# set: file of references, its splits in turn from image to image, its sentences
SETS: dict[str, tuple[str, tuple[str, ...], Callable[[Scene, Item], list[str]]]] = {
    "refcoco": ("refs(unc).p", ("val", "val", "testA", "testB"), by_place),
    "refcoco+": ("refs(unc).p", ("val", "val", "testA", "testB"), by_looks),
    "refcocog": ("refs(umd).p", ("val", "val", "test", "test"), by_neighbour),
}


def box_text(item: Item, size: int) -> str:
    """The answer: left, top, right, bottom in 0..1 with two decimals, in steps that the tiny model can tell apart."""
    return "[" + ", ".join(f"{round(edge / size / STEP) * STEP:.2f}" for edge in item.box) + "]"


def write(folder: Path, num_images: int, rng: np.random.Generator) -> None:
    """Write the three sets about the same images, one reference per object."""
    scenes = {number: random_scene(rng, NUM_ITEMS) for number in distinct_numbers(rng, num_images, 580_000)}
    for number, scene in scenes.items():
        save_image(scene.image(), folder / "train2014" / _image_name(number))
    write_instances = _instances(scenes)
    for name, (file, splits, describe) in SETS.items():
        refs: list[dict[str, object]] = []
        num_sentences = 0
        for i, (number, scene) in enumerate(scenes.items()):
            for item_number, item in enumerate(scene.items):
                sentences = [
                    {"tokens": text.split(), "raw": text.capitalize(), "sent_id": sent_id, "sent": text}
                    for sent_id, text in enumerate(
                        shuffled(describe(scene, item), rng)[:SENTENCES_PER_OBJECT], start=num_sentences
                    )
                ]
                num_sentences += len(sentences)
                refs.append(
                    {
                        "sent_ids": [sentence["sent_id"] for sentence in sentences],
                        "file_name": _image_name(number).replace(".jpg", f"_{item_number}.jpg"),
                        "ann_id": number * 10 + item_number,
                        "ref_id": len(refs),
                        "image_id": number,
                        "split": splits[i % len(splits)],
                        "sentences": sentences,
                        "category_id": SHAPES.index(item.shape) + 1,
                    }
                )
        write_json(folder / name / "instances.json", write_instances)
        (folder / name / file).write_bytes(pickle.dumps(refs, protocol=2))


def _instances(scenes: dict[int, Scene]) -> dict[str, object]:
    return {
        "info": {"description": "COCO train2014 in miniature"},
        "licenses": [],
        "images": [
            {"id": number, "file_name": _image_name(number), "width": scene.size, "height": scene.size, "license": 1}
            for number, scene in scenes.items()
        ],
        "annotations": [_annotation(number, i, item) for number, scene in scenes.items()
                        for i, item in enumerate(scene.items)],
        "categories": [{"supercategory": "shape", "id": i, "name": shape} for i, shape in enumerate(SHAPES, start=1)],
    }  # fmt: skip


def _annotation(image_id: int, number: int, item: Item) -> dict[str, object]:
    left, top, right, bottom = (round(edge, 2) for edge in item.box)
    return {
        "id": image_id * 10 + number,
        "image_id": image_id,
        "category_id": SHAPES.index(item.shape) + 1,
        "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        "area": item.area,
        "iscrowd": 0,
    }


def _image_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"
