"""GQA in miniature: 31 questions about an image, with the programs that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cobra.data.scenes import SHAPES, Item, Scene
from cobra.data.toy.asking import (
    COLORS,
    KINDS,
    Asked,
    distinct_numbers,
    fair_choice,
    plausible,
    random_scene,
    save_image,
    the_only,
    write_json,
)
from cobra.data.toy.relations import DIRECTIONS, PHRASES, pairs

FOLDER = "gqa"
QUESTIONS_PER_IMAGE = 31

Step = tuple[str, str, tuple[int, ...]]  # operation, argument, the earlier steps that it works on


@dataclass(frozen=True, kw_only=True)
class Reasoned(Asked):
    """A question with GQA's account of it; `kind` is the detailed type.

    Attributes:
        structural, semantic: types.
        about: what the question is about, for the group that its answers are compared in.
        program: the steps to the answer.
        entails: what a right answer says about other questions: their text.
    """

    structural: str
    semantic: str
    about: str
    program: tuple[Step, ...]
    entails: tuple[str, ...] = field(default=())


def candidates(scene: Scene) -> list[Reasoned]:
    """Everything that can be asked."""
    return [*_existence(scene), *_attributes(scene), *_spatial(scene), *_compared(scene)]


def _existence(scene: Scene) -> list[Reasoned]:
    names = {item.name for item in scene.items}
    shapes = {item.shape for item in scene.items}
    asked = [
        Reasoned(
            question=f"Is there a {color} {shape}?",
            answer=_yes(f"{color} {shape}" in names),
            kind="existAttrC",
            structural="verify",
            semantic="obj",
            about=shape,
            program=(("select", shape, ()), ("filter color", color, (0,)), ("exist", "?", (1,))),
            entails=(f"Is there a {shape}?",) if f"{color} {shape}" in names else (),
        )
        for color, shape in KINDS
    ]
    for shape in SHAPES:
        asked.append(
            Reasoned(
                question=f"Is there a {shape}?",
                answer=_yes(shape in shapes),
                kind="exist",
                structural="verify",
                semantic="obj",
                about=shape,
                program=(("select", shape, ()), ("exist", "?", (0,))),
            )
        )
    for i, one in enumerate(SHAPES):
        for other in SHAPES[i + 1 :]:
            asked.append(
                Reasoned(
                    question=f"Are there both a {one} and a {other}?",
                    answer=_yes({one, other} <= shapes),
                    kind="existAnd",
                    structural="logical",
                    semantic="obj",
                    about=one,
                    program=(
                        ("select", one, ()),
                        ("exist", "?", (0,)),
                        ("select", other, ()),
                        ("exist", "?", (2,)),
                        ("and", "", (1, 3)),
                    ),
                    entails=(f"Is there a {one}?", f"Is there a {other}?") if {one, other} <= shapes else (),
                )
            )
    return asked


def _attributes(scene: Scene) -> list[Reasoned]:
    asked: list[Reasoned] = []
    for shape, item in the_only(scene, lambda item: item.shape).items():
        select: Step = ("select", shape, ())
        asked.append(
            Reasoned(
                question=f"What color is the {shape}?",
                answer=item.color,
                kind="directOf",
                structural="query",
                semantic="attr",
                about=f"{shape} color",
                program=(select, ("query", "color", (0,))),
                entails=(f"Is the {shape} {item.color}?",),
            )
        )
        for color in COLORS:
            asked.append(
                Reasoned(
                    question=f"Is the {shape} {color}?",
                    answer=_yes(color == item.color),
                    kind="verifyAttrC",
                    structural="verify",
                    semantic="attr",
                    about=f"{shape} color",
                    program=(select, ("verify color", color, (0,))),
                )
            )
            if color != item.color:
                first, second = sorted((color, item.color))
                asked.append(
                    Reasoned(
                        question=f"Is the {shape} {first} or {second}?",
                        answer=item.color,
                        kind="chooseAttr",
                        structural="choose",
                        semantic="attr",
                        about=f"{shape} color",
                        program=(select, ("choose color", f"{first}|{second}", (0,))),
                        entails=(f"Is the {shape} {item.color}?",),
                    )
                )
    for color, item in the_only(scene, lambda item: item.color).items():
        asked.append(
            Reasoned(
                question=f"What shape is the {color} object?",
                answer=item.shape,
                kind="directWhich",
                structural="query",
                semantic="attr",
                about="object shape",
                program=(("select", "object", ()), ("filter color", color, (0,)), ("query", "shape", (1,))),
                entails=(f"Is there a {item.shape}?", f"Is there a {item.name}?"),
            )
        )
    return asked


def _spatial(scene: Scene) -> list[Reasoned]:
    asked: list[Reasoned] = []
    for one, other in pairs(scene):
        for direction, holds in DIRECTIONS.items():
            label = holds(one, other, scene.size)
            if label is not None:
                asked.append(
                    Reasoned(
                        question=f"Is the {one.name} {PHRASES[direction]} the {other.name}?",
                        answer=_yes(label),
                        kind="relVerify",
                        structural="verify",
                        semantic="rel",
                        about=one.shape,
                        program=(
                            ("select", other.shape, ()),
                            ("filter color", other.color, (0,)),
                            ("verify rel", f"{one.shape},{PHRASES[direction]},o", (1,)),
                        ),
                    )
                )
    for item in scene.items:
        for direction, holds in DIRECTIONS.items():
            labels = {one: holds(one, item, scene.size) for one in scene.items if one is not item}
            there = [one for one, label in labels.items() if label]
            if len(there) == 1 and None not in labels.values():  # nothing else could be meant
                asked.append(
                    Reasoned(
                        question=f"What color is the object {PHRASES[direction]} the {item.name}?",
                        answer=there[0].color,
                        kind="relO",
                        structural="query",
                        semantic="rel",
                        about="object color",
                        program=(
                            ("select", item.shape, ()),
                            ("filter color", item.color, (0,)),
                            ("relate", f"object,{PHRASES[direction]},s", (1,)),
                            ("query", "color", (2,)),
                        ),
                    )
                )
    return asked


def _compared(scene: Scene) -> list[Reasoned]:
    asked: list[Reasoned] = []
    only = list(the_only(scene, lambda item: item.shape).values())
    for one, other in ((one, other) for i, one in enumerate(only) for other in only[i + 1 :]):
        asked.append(
            Reasoned(
                question=f"Do the {one.shape} and the {other.shape} have the same color?",
                answer=_yes(one.color == other.color),
                kind="twoSame",
                structural="compare",
                semantic="attr",
                about="color",
                program=(("select", one.shape, ()), ("select", other.shape, ()), ("same color", "color", (0, 1))),
            )
        )
    for one, other in pairs(scene):
        common = [name for name in ("color", "shape") if getattr(one, name) == getattr(other, name)]
        if len(common) == 1:  # kinds differ, so that it is never both
            asked.append(
                Reasoned(
                    question=f"What do the {one.name} and the {other.name} have in common?",
                    answer=common[0],
                    kind="twoCommon",
                    structural="compare",
                    semantic="attr",
                    about="common",
                    program=(*_named(one, 0), *_named(other, 2), ("common", "", (1, 3))),
                )
            )
    return asked


def _named(item: Item, start: int) -> tuple[Step, Step]:
    return ("select", item.shape, ()), ("filter color", item.color, (start,))


def _yes(label: bool) -> str:
    return "yes" if label else "no"


def write(folder: Path, num_images: int, rng: np.random.Generator) -> None:
    """Write questions, choices and images."""
    questions: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    for image_id in distinct_numbers(rng, num_images, 2_400_000):
        scene = random_scene(rng, (3, 3))
        save_image(scene.image(), folder / "images" / f"{image_id}.jpg")
        asked = fair_choice(candidates(scene), QUESTIONS_PER_IMAGE, rng)
        ids = {one.question: f"{20 * 10**7 + len(questions) + i}" for i, one in enumerate(asked)}
        for one in asked:
            number = ids[one.question]
            questions[number] = _row(one, image_id, [number, *(ids[text] for text in one.entails if text in ids)])
            choices[number] = {"valid": _valid(one), "plausible": _plausible(one, scene)}
    write_json(folder / "testdev_balanced_questions.json", questions)
    write_json(folder / "testdev_choices.json", choices)


def _valid(asked: Reasoned) -> list[str]:
    """Answers of the right kind."""
    if asked.kind == "chooseAttr":
        return asked.program[-1][1].split("|")
    return ["color", "shape"] if asked.kind == "twoCommon" else plausible(asked.answer)


def _plausible(asked: Reasoned, scene: Scene) -> list[str]:
    """Valid answers that something in the image could have suggested."""
    seen = {word for item in scene.items for word in (item.color, item.shape)}
    return [word for word in _valid(asked) if word in seen or word not in (*COLORS, *SHAPES)]


def _row(asked: Reasoned, image_id: int, entailed: list[str]) -> dict[str, Any]:
    program = [
        {"operation": operation, "dependencies": list(steps), "argument": argument}
        for operation, argument, steps in asked.program
    ]
    return {
        "semantic": program,
        "entailed": entailed,
        "equivalent": entailed[:1],
        "question": asked.question,
        "imageId": str(image_id),
        "isBalanced": True,
        "groups": {"global": asked.about, "local": f"{asked.kind}-{asked.about}"},
        "answer": asked.answer,
        "semanticStr": "->".join(f"{step['operation']}: {step['argument']}" for step in program),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": asked.kind, "semantic": asked.semantic, "structural": asked.structural},
        "fullAnswer": f"{asked.answer.capitalize()}.",
    }
