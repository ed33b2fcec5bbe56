"""VSR in miniature: statements about how two objects lie to each other, half of them true."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cobra.data.scenes import Scene
from cobra.data.toy.asking import (
    Asked,
    distinct_numbers,
    fair_choice,
    random_scene,
    save_image,
    shuffled,
    write_json_lines,
)
from cobra.data.toy.relations import DIRECTIONS, pairs

FOLDER = "vsr"


@dataclass(frozen=True, kw_only=True)
class Statement(Asked):
    """A statement and what it is about; `kind` is the relation."""

    subject: str
    object: str


def candidates(scene: Scene) -> list[Statement]:
    """Every statement that is clearly true or clearly false."""
    return [
        Statement(
            question=f"The {one.name} is {relation} the {other.name}.",
            answer=str(label),
            kind=relation,
            subject=one.name,
            object=other.name,
        )
        for one, other in pairs(scene)
        for relation, holds in DIRECTIONS.items()
        if (label := holds(one, other, scene.size)) is not None
    ]


def write(folder: Path, num_images: int, rng: np.random.Generator) -> None:
    """Write test.jsonl and, half as long, dev.jsonl: a true and a false statement about each image."""
    numbers = shuffled(distinct_numbers(rng, num_images + num_images // 2, 580_000), rng)
    for split, chosen in (("test", numbers[:num_images]), ("dev", numbers[num_images:])):
        rows: list[dict[str, object]] = []
        for number in chosen:
            scene = random_scene(rng, (2, 2))
            save_image(scene.image(), folder / "images" / f"{number:012d}.jpg")
            for label in (True, False):
                fitting = [one for one in candidates(scene) if one.answer == str(label)]
                rows += [_row(number, one, rng) for one in fair_choice(fitting, 1, rng)]
        write_json_lines(folder / f"{split}.jsonl", rows)


def _row(number: int, statement: Statement, rng: np.random.Generator) -> dict[str, object]:
    voters = [str(rng.choice(60, 3, replace=False).tolist()), "[]"]  # lists as text, as in the official file
    yes, no = voters if statement.answer == "True" else reversed(voters)
    return {
        "image": f"{number:012d}.jpg",
        "image_link": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
        "caption": statement.question,
        "label": int(statement.answer == "True"),
        "relation": statement.kind,
        "subj": statement.subject,
        "obj": statement.object,
        "annotator_id": int(rng.integers(60)),
        "vote_true_validator_id": yes,
        "vote_false_validator_id": no,
    }
