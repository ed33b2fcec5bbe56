"""All nine miniature benchmarks and their training set in one folder, which serves as `data_root`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cobra.config.checks import not_negative, positive
from cobra.data.made import make_once, whole_folder
from cobra.data.scenes import Scene, scattered_scene
from cobra.data.toy import gqa, pope, refcoco, textvqa, training, vizwiz, vqav2, vsr
from cobra.data.toy.asking import KINDS, SIDES, SIZE, write_json
from cobra.errors import ConfigError, DataError

MANIFEST = "toy.json"  # what the folder was made from
IMAGE_COUNTS = ("train", "vqav2", "gqa", "vizwiz", "textvqa", "vsr", "pope", "refcoco")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """What to make: numbers of images, and the seed that they are drawn from. POPE shares those of VQA-v2."""

    seed: int = 0
    train: int = 8000
    vqav2: int = 100
    gqa: int = 20
    vizwiz: int = 300
    textvqa: int = 150
    vsr: int = 200
    pope: int = 30
    refcoco: int = 100

    def __post_init__(self) -> None:
        not_negative("seed", self.seed)
        for name in IMAGE_COUNTS:
            positive(name, getattr(self, name))
        if self.pope > self.vqav2:
            raise ConfigError(f"pope={self.pope} images are among the vqav2={self.vqav2} ones; there must be no more.")


def prepare(folder: Path, toy: Toy | None = None) -> None:
    """Write everything into `folder`, complete or not at all. Does nothing when it is there.

    Any number of processes may call this at once: one works, the others wait.

    Raises:
        DataError: the folder holds something else (which stays as it is), or another toy than the one asked for.
    """
    make_once(folder, _is_there, lambda folder: _write(folder, toy or Toy()))
    made = json.loads((folder.expanduser() / MANIFEST).read_text(encoding="utf-8"))
    if toy is not None and made != asdict(toy):
        different = ", ".join(f"{key}={value}" for key, value in made.items() if asdict(toy).get(key) != value)
        raise DataError(f"{folder} was made with {different}; choose another folder, or remove it yourself.")


def _is_there(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _write(folder: Path, toy: Toy) -> None:
    with whole_folder(folder, "toy benchmarks") as root:
        # A stream of random numbers each: the size of one leaves the others as they are.
        streams = {name: np.random.default_rng([toy.seed, i]) for i, name in enumerate(IMAGE_COUNTS)}
        training.write(root, toy.train, streams["train"])
        _write_coco(root, toy, streams)
        gqa.write(root / gqa.FOLDER, toy.gqa, streams["gqa"])
        vizwiz.write(root / vizwiz.FOLDER, toy.vizwiz, streams["vizwiz"])
        textvqa.write(root / textvqa.FOLDER, toy.textvqa, streams["textvqa"])
        vsr.write(root / vsr.FOLDER, toy.vsr, streams["vsr"])
        refcoco.write(root / refcoco.FOLDER, toy.refcoco, streams["refcoco"])
        write_json(root / MANIFEST, asdict(toy))


def _write_coco(root: Path, toy: Toy, streams: dict[str, np.random.Generator]) -> None:
    """Write the two benchmarks that share images: POPE asks about the first ones, which hold enough objects."""
    rng = streams["vqav2"]
    scenes: list[Scene] = []
    for number in range(toy.vqav2):
        count = int(rng.integers(pope.NUM_OBJECTS if number < toy.pope else 1, 3, endpoint=True))
        kinds = rng.choice(len(KINDS), count, replace=False, p=pope.frequencies())
        scenes.append(scattered_scene(rng, [KINDS[i] for i in kinds], SIZE, SIDES))
    images = vqav2.write(root / vqav2.FOLDER, scenes, rng)
    pope.write(root / pope.FOLDER, dict(zip(images[: toy.pope], scenes, strict=False)), streams["pope"])
