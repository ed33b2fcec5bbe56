"""VQA-v2 in miniature: five questions about an image of COCO val2014, ten answers each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cobra.data.scenes import SHAPES, Scene
from cobra.data.toy.asking import (
    COLORS,
    KINDS,
    Asked,
    distinct_numbers,
    fair_choice,
    plausible,
    save_image,
    ten_answers,
    the_only,
    write_json,
)

FOLDER = "vqa-v2"
QUESTIONS_PER_IMAGE = 5
LICENSE = {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons Attribution 4.0"}
TYPES = {"yes": "yes/no", "no": "yes/no"} | {str(number): "number" for number in range(10)}


def candidates(scene: Scene) -> list[Asked]:
    """Everything that can be asked; `kind` is the question type."""
    names = {item.name for item in scene.items}
    asked = [Asked(question="How many objects are there?", answer=str(len(scene.items)), kind="how many")]
    for shape in SHAPES:
        count = sum(item.shape == shape for item in scene.items)
        asked.append(Asked(question=f"How many {shape}s are there?", answer=str(count), kind="how many"))
    for color, shape in KINDS:
        found = "yes" if f"{color} {shape}" in names else "no"
        asked.append(Asked(question=f"Is there a {color} {shape}?", answer=found, kind="is there a"))
    for shape, item in the_only(scene, lambda item: item.shape).items():
        asked.append(Asked(question=f"What color is the {shape}?", answer=item.color, kind="what color is the"))
        asked += [
            Asked(question=f"Is the {shape} {color}?", answer="yes" if color == item.color else "no", kind="is the")
            for color in COLORS
        ]
    for color, item in the_only(scene, lambda item: item.color).items():
        asked.append(Asked(question=f"What shape is the {color} object?", answer=item.shape, kind="what"))
    return asked


def write(folder: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> list[str]:
    """Write questions, annotations and images; return the images' names."""
    questions: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    image_ids = distinct_numbers(rng, len(scenes), 580_000)
    for image_id, scene in zip(image_ids, scenes, strict=True):
        save_image(scene.image(), folder / "images_val2014" / image_name(image_id))
        for number, asked in enumerate(fair_choice(candidates(scene), QUESTIONS_PER_IMAGE, rng)):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append({**ids, "question": asked.question})
            said = ten_answers(asked.answer, plausible(asked.answer), rng)
            sure = rng.choice(["yes", "maybe"], len(said)).tolist()
            annotations.append(
                {
                    **ids,
                    "question_type": asked.kind,
                    "answer_type": TYPES.get(asked.answer, "other"),
                    "multiple_choice_answer": asked.answer,
                    "answers": [
                        {"answer": answer, "answer_confidence": confidence, "answer_id": i}
                        for i, (answer, confidence) in enumerate(zip(said, sure, strict=True), start=1)
                    ],
                }
            )
    about = {
        "info": {"description": "VQA v2.0 in miniature", "version": "2.0", "year": 2017, "contributor": "", "url": ""},
        "license": LICENSE,
        "data_type": "mscoco",
        "data_subtype": "val2014",
    }
    asked_of_whom = {"task_type": "Open-Ended", "questions": questions}
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", about | asked_of_whom)
    write_json(folder / "v2_mscoco_val2014_annotations.json", about | {"annotations": annotations})
    return [image_name(image_id) for image_id in image_ids]


def image_name(image_id: int) -> str:
    """Return the file name of an image of COCO val2014."""
    return f"COCO_val2014_{image_id:012d}.jpg"
