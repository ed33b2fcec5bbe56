"""POPE: is this object in the image? Three ways of choosing absent objects, 500 COCO images (AoiDragon/POPE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from cobra.config import one_of
from cobra.eval.benchmark import MEAN, OFFICIAL, Choices, FreeText, Prediction, Question
from cobra.eval.files import Source, check_unique, expecting, locate, read_json_lines
from cobra.eval.rules.binary import confusion
from cobra.eval.two_words import TwoWords

FOLDER = "pope"
ANNOTATIONS_URL = "https://github.com/AoiDragon/POPE/tree/main/output/coco"
IMAGES = Source(
    ("val_images", "val2014", "../vqa-v2/images_val2014", "../vqa-v2/val2014", "../coco/val2014"),
    "http://images.cocodataset.org/zips/val2014.zip",
)
SPLITS = ("random", "popular", "adversarial")
ASK = ("choices", "text")


@dataclass
class Pope(TwoWords):
    """Accuracy of the likelier of "Yes" and "No" (a tie counts as Yes), per split and the mean of the splits.

    The paper's harness compares probabilities. The official evaluate.py reads generated text, which `ask: text` does
    here; for a model that answers with its likelier word the two agree. The files grew: the random split had 2,910 rows
    in the version that the paper's harness pinned, and has 3,000 today, so no number is expected.
    """

    mean_of_parts: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, str]] = {"POPE": MEAN}
    words: ClassVar[tuple[str, str]] = ("Yes", "No")
    image_url: ClassVar[str] = IMAGES.url
    data_root: str  # holds pope/, or is that folder
    prompt: str  # what is asked, with {question} in it
    splits: list[str] = field(default_factory=lambda: list(SPLITS))  # each is scored by itself, and their mean
    ask: str = "choices"  # "choices": compare the probabilities of Yes and No | "text": read the answer
    name: str = "pope"  # of its folder below `paths.results`
    max_new_tokens: int = 128  # limit of an answer

    def __post_init__(self) -> None:
        for split in self.splits:
            one_of("benchmark.splits", split, SPLITS)
        one_of("benchmark.ask", self.ask, ASK)
        if self.ask == "text":
            self.rules = (OFFICIAL,)  # the paper's harness compares probabilities

    def questions(self) -> list[Question]:
        """Read the splits; an id is `<split>/<question_id>`."""
        sources = [
            Source((f"coco_pope_{split}.json", f"output/coco/coco_pope_{split}.json"), ANNOTATIONS_URL)
            for split in self.splits
        ]
        paths, images = locate(self.data_root, FOLDER, sources, IMAGES)
        questions: list[Question] = []
        is_text = self.ask == "text"
        answer = FreeText(max_new_tokens=self.max_new_tokens) if is_text else Choices(words=self.words)
        for split, path in zip(self.splits, paths, strict=True):
            with expecting(path, "a file of POPE's questions"):
                questions += [
                    Question(
                        id=f"{split}/{row['question_id']}",
                        image=images / row["image"],
                        text=self.prompt.replace("{question}", row["text"]),
                        answer=answer,
                        truth=_is_yes(row),
                        part=split,
                    )
                    for row in read_json_lines(path)
                ]
            check_unique(path, [question.id for question in questions])
        return questions

    def is_positive(self, prediction: Prediction) -> bool:
        """Read a text as the official evaluate.py does: no if its first sentence has "No", "no" or "not", else yes."""
        if not isinstance(prediction, str):
            return super().is_positive(prediction)
        words = prediction.partition(".")[0].replace(",", "").split(" ")
        return not {"No", "no", "not"} & set(words)

    def details(
        self, rule: str, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> dict[str, float | None]:
        """Return precision, recall, F1, the share of yes, and the areas under the curves ("Yes" is positive)."""
        true = [cast("bool", question.truth) for question in questions]
        yes = [self.is_positive(predictions[question.id]) for question in questions]
        return confusion(yes, true) | super().details(rule, questions, predictions)


def _is_yes(row: dict[str, Any]) -> bool:
    if row["label"] not in ("yes", "no"):
        raise ValueError(f"the label of question {row['question_id']} is {row['label']!r} instead of yes or no")
    return row["label"] == "yes"
