"""What can be asked about a scene, and a fair choice of it; the pictures and the people that all benchmarks share."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from cobra.data.scenes import SHAPES, Item, Scene, scattered_scene

SIZE = 64  # pixels along a picture's side, what the tiny towers see
SIDES = (0.28, 0.44)  # of objects, as a share of SIZE: three of them find room, and fill several patches each
COLORS = ("black", "blue", "green", "red", "yellow")  # the five that nobody confuses
KINDS = tuple(product(COLORS, SHAPES))  # what is "an object" to the benchmarks
CLOSED = ("yes", "no", "Yes", "No", "True", "False")
NUM_ANSWERS = 10  # people that answer a question


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about a scene. `kind` is its template, of which a fair choice has equally many."""

    question: str
    answer: str
    kind: str


AskedT = TypeVar("AskedT", bound=Asked)
T = TypeVar("T")


def fair_choice(candidates: Sequence[AskedT], count: int, rng: np.random.Generator) -> list[AskedT]:
    """Choose up to `count` questions: kinds in turn, as many true as false ones where there are enough."""
    groups: dict[tuple[str, str], list[AskedT]] = defaultdict(list)
    for one in candidates:
        groups[one.kind, one.answer if one.answer in CLOSED else ""].append(one)
    waiting = [shuffled(group, rng) for group in shuffled(list(groups.values()), rng)]
    chosen: list[AskedT] = []
    while len(chosen) < count and any(waiting):
        chosen += [group.pop() for group in waiting if group]
    return chosen[:count]


def shuffled(values: Sequence[T], rng: np.random.Generator) -> list[T]:
    """Return the values in another order."""
    return [values[i] for i in rng.permutation(len(values))]


def random_kinds(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Colours and shapes of a scene's objects, no two the same: "the red circle" is always one."""
    return [KINDS[i] for i in rng.choice(len(KINDS), count, replace=False)]


def random_scene(rng: np.random.Generator, num_items: tuple[int, int]) -> Scene:
    """A scene with so many objects, the bounds included."""
    count = int(rng.integers(*num_items, endpoint=True))
    return scattered_scene(rng, random_kinds(rng, count), SIZE, SIDES)


def the_only(scene: Scene, what: Callable[[Item], str]) -> dict[str, Item]:
    """Colours, or shapes, that one object alone has."""
    names = [what(item) for item in scene.items]
    return {what(item): item for item in scene.items if names.count(what(item)) == 1}


def ten_answers(answer: str, others: Sequence[str], rng: np.random.Generator) -> list[str]:
    """What ten people say: seven or more are right."""
    wrong = [one for one in others if one != answer]
    num_right = int(rng.integers(7, NUM_ANSWERS, endpoint=True))
    said = [answer] * num_right + [wrong[i] for i in rng.integers(0, len(wrong), NUM_ANSWERS - num_right)]
    return shuffled(said, rng)


def plausible(answer: str) -> list[str]:
    """Answers that people might confuse with this one."""
    families = (("yes", "no"), COLORS, SHAPES, ("0", "1", "2", "3"))
    return next(list(family) for family in families if answer in family)


def distinct_numbers(rng: np.random.Generator, count: int, upper: int) -> list[int]:
    """Return image ids as they come with photographs: different, increasing, with gaps."""
    return np.sort(rng.choice(upper, count, replace=False) + 1).tolist()


def save_image(image: Image.Image, path: Path) -> None:
    """Write a JPEG; colours in full resolution, as the picture is small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, subsampling=0)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_json_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write one JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
