"""RefCOCO, RefCOCO+, RefCOCOg: find the region that a sentence describes (github.com/lichengunc/refer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from PIL import Image

from cobra.config import one_of
from cobra.errors import DataError
from cobra.eval.benchmark import PAPER, Benchmark, Box, Prediction, Question, text
from cobra.eval.files import Source, check_unique, expecting, locate, read_json, read_pickle
from cobra.eval.rules.boxes import THRESHOLD, BoxXYXY, iou, normalise, parse_box, rounded

FOLDER = "refcoco"
URL = "https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}.zip"
IMAGES = Source(("train2014", "images", "../coco/train2014"), "http://images.cocodataset.org/zips/train2014.zip")
SETS = {
    "RefCOCO": ("refcoco", "refs(unc).p"),
    "RefCOCO+": ("refcoco+", "refs(unc).p"),
    "RefCOCOg": ("refcocog", "refs(umd).p"),
}
SPLITS = ("val", "testA", "testB", "test", "train")


class Truth(NamedTuple):
    """The true box, in full precision and as the paper's harness rounds it."""

    official: BoxXYXY
    paper: BoxXYXY


@dataclass
class RefCOCO(Benchmark):
    """Right when intersection over union with the true box is 0.5 or more; an unreadable box is wrong, and counted."""

    columns: ClassVar[Mapping[str, str]] = {name: name for name in SETS}
    image_url: ClassVar[str] = IMAGES.url
    data_root: str  # holds refcoco/ with refcoco/, refcoco+/, refcocog/ in it, or is that folder
    prompt: str  # what is asked, with {question} in it
    sets: list[str] = field(default_factory=lambda: list(SETS))  # each is scored by itself
    splits: list[str] = field(default_factory=lambda: ["val"])  # "val" | "testA" | "testB" | "test", as a set has them
    name: str = "refcoco"  # of its folder below `paths.results`
    max_new_tokens: int = 128  # limit of an answer

    def __post_init__(self) -> None:
        for name in self.sets:
            one_of("benchmark.sets", name, SETS)
        for split in self.splits:
            one_of("benchmark.splits", split, SPLITS)

    def questions(self) -> list[Question]:
        """Read the sets; an id is `<set>/<ref_id>/<sent_id>`. A set has only some of the splits."""
        sources = [
            Source((f"{SETS[name][0]}/{file}",), URL.format(SETS[name][0]))
            for name in self.sets
            for file in (SETS[name][1], "instances.json")
        ]
        paths, images = locate(self.data_root, FOLDER, sources, IMAGES)
        questions: list[Question] = []
        for name, refs, instances in zip(self.sets, paths[::2], paths[1::2], strict=True):
            questions += self._read(name, refs, instances, images)
            check_unique(refs, [question.id for question in questions])
        if not questions:
            raise DataError(f"{', '.join(self.sets)} have no split {', '.join(self.splits)}; see benchmark.splits.")
        return questions

    def _read(self, name: str, refs_path: Path, instances_path: Path, images: Path) -> list[Question]:
        with expecting(instances_path, f"the instances.json of {name}"):
            instances = read_json(instances_path)
            boxes = {row["id"]: tuple(row["bbox"]) for row in instances["annotations"]}
            sizes = {row["id"]: (row["width"], row["height"]) for row in instances["images"]}
        answer = Box(max_new_tokens=self.max_new_tokens)
        questions: list[Question] = []
        with expecting(refs_path, f"the references of {name}"):
            for ref in read_pickle(refs_path):
                if ref["split"] not in self.splits:
                    continue
                image = images / f"COCO_train2014_{ref['image_id']:012d}.jpg"
                box = normalise(boxes[ref["ann_id"]], *_size(image, sizes[ref["image_id"]]))
                questions += [
                    Question(
                        id=f"{name}/{ref['ref_id']}/{sentence['sent_id']}",
                        image=image,
                        text=self.prompt.replace("{question}", sentence["sent"]),
                        answer=answer,
                        truth=Truth(box, rounded(box)),
                        part=name if ref["split"] == "val" else f"{name} {ref['split']}",
                    )
                    for sentence in ref["sentences"]
                ]
        return questions

    def show_truth(self, question: Question) -> str:
        """The box as the model should write it."""
        return "[" + ", ".join(f"{value:.2f}" for value in question.truth.official) + "]"

    def true_box(self, question: Question) -> BoxXYXY:
        """The official one."""
        return question.truth.official

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        """Score by both rules: they differ in the true box."""
        box = parse_box(text(prediction))
        if box is None:
            return 0.0, 0.0
        official, paper = (float(iou(box, true) >= THRESHOLD) for true in question.truth)
        return official, paper

    def details(
        self, rule: str, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> dict[str, float | None]:
        """Return the mean IoU, 0 for what is no box, and how many there are of these."""
        boxes = [parse_box(text(predictions[question.id])) for question in questions]
        true: list[Any] = [q.truth.paper if rule == PAPER else q.truth.official for q in questions]
        overlaps = [iou(box, truth) for box, truth in zip(boxes, true, strict=True) if box is not None]
        return {"mean_iou": 100 * sum(overlaps) / len(boxes), "invalid": boxes.count(None)}


def _size(image: Path, annotated: tuple[int, int]) -> tuple[int, int]:
    """Return an image's own width and height, as the paper's harness does; as annotated where it is not there."""
    try:
        with cast("Any", Image.open(image)) as file:
            return file.size
    except OSError:
        return annotated
