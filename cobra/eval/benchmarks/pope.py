"""POPE: is this object in the image? Three ways of choosing absent objects, 500 COCO images (AoiDragon/POPE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from cobra.config import one_of
from cobra.eval.benchmark import MEAN, Benchmark, Choices, Prediction, Question, probabilities
from cobra.eval.files import Source, check_unique, expecting, locate, read_json_lines
from cobra.eval.rules.binary import areas, confusion, says, share

FOLDER = "pope"
ANNOTATIONS_URL = "https://github.com/AoiDragon/POPE/tree/main/output/coco"
IMAGES = Source(
    ("val_images", "val2014", "../vqa-v2/images_val2014", "../vqa-v2/val2014", "../coco/val2014"),
    "http://images.cocodataset.org/zips/val2014.zip",
)
SPLITS = ("random", "popular", "adversarial")
WORDS = ("Yes", "No")


@dataclass
class Pope(Benchmark):
    """Accuracy of the likelier of "Yes" and "No" (a tie counts as Yes), per split and the mean of the splits.

    The official evaluate.py reads generated text, the harness compares probabilities; for a model that answers with
    its likelier word they agree. The files grew: the random split had 2,910 rows in the version that the paper's
    harness pinned, and has 3,000 today, so no number is expected.
    """

    mean_of_parts: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, str]] = {"POPE": MEAN}
    image_url: ClassVar[str] = IMAGES.url
    data_root: str
    prompt: str
    splits: list[str] = field(default_factory=lambda: list(SPLITS))
    name: str = "pope"

    def __post_init__(self) -> None:
        for split in self.splits:
            one_of("benchmark.splits", split, SPLITS)

    def questions(self) -> list[Question]:
        """Read the splits; an id is `<split>/<question_id>`."""
        sources = [
            Source((f"coco_pope_{split}.json", f"output/coco/coco_pope_{split}.json"), ANNOTATIONS_URL)
            for split in self.splits
        ]
        paths, images = locate(self.data_root, FOLDER, sources, IMAGES)
        questions: list[Question] = []
        for split, path in zip(self.splits, paths, strict=True):
            with expecting(path, "a file of POPE's questions"):
                questions += [
                    Question(
                        id=f"{split}/{row['question_id']}",
                        image=images / row["image"],
                        text=self.prompt.replace("{question}", row["text"]),
                        answer=Choices(words=WORDS),
                        truth=_is_yes(row),
                        part=split,
                    )
                    for row in read_json_lines(path)
                ]
            check_unique(path, [question.id for question in questions])
        return questions

    def show_truth(self, question: Question) -> str:
        """The right one of the two words."""
        return WORDS[0] if question.truth else WORDS[1]

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        """Both rules are the same."""
        score = float(says(probabilities(prediction), *WORDS) == question.truth)
        return score, score

    def details(
        self, rule: str, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> dict[str, float | None]:
        """Return precision, recall, F1, the share of yes, and the areas under the curves ("Yes" is positive)."""
        shares = [share(probabilities(predictions[question.id]), *WORDS) for question in questions]
        true = [cast("bool", question.truth) for question in questions]
        yes = [says(probabilities(predictions[question.id]), *WORDS) for question in questions]
        return confusion(yes, true) | areas(shares, true)


def _is_yes(row: dict[str, Any]) -> bool:
    if row["label"] not in ("yes", "no"):
        raise ValueError(f"the label of question {row['question_id']} is {row['label']!r} instead of yes or no")
    return row["label"] == "yes"
