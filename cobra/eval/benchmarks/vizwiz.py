"""VizWiz, validation: 4,319 questions of blind people, one photo each (vizwiz.org/tasks-and-datasets/vqa)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cobra.eval.benchmark import Benchmark, FreeText, Prediction, Question, most_common, text
from cobra.eval.files import Source, check_unique, expecting, locate, read_json, some_answers
from cobra.eval.rules import vqa
from cobra.eval.rules.binary import average_precision, confusion

FOLDER = "vizwiz"
ANNOTATIONS = Source(
    ("val.json", "Annotations/val.json"), "https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip"
)
IMAGES = Source(("val_images", "val"), "https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip")


@dataclass
class VizWiz(Benchmark):
    """Accuracy against ten human answers, and how well "unanswerable" is said. Official: VizWiz's VQA script."""

    columns: ClassVar[Mapping[str, str]] = {"VizWiz": ""}
    image_url: ClassVar[str] = IMAGES.url
    data_root: str  # holds vizwiz/, or is that folder
    prompt: str  # what is asked, with {question} in it
    name: str = "vizwiz"  # of its folder below `paths.results`
    max_new_tokens: int = 128  # limit of an answer

    def questions(self) -> list[Question]:
        """Read val.json; a question's id is the name of its image file."""
        (path,), images = locate(self.data_root, FOLDER, [ANNOTATIONS], IMAGES)
        with expecting(path, "VizWiz's val.json"):
            questions = [
                Question(
                    id=row["image"],
                    image=images / row["image"],
                    text=self.prompt.replace("{question}", row["question"]),
                    answer=FreeText(max_new_tokens=self.max_new_tokens),
                    truth=tuple(entry["answer"] for entry in some_answers(row, row["image"])),
                    types={
                        "answerable": "answerable" if int(row["answerable"]) else "unanswerable",
                        "answer type": row["answer_type"],
                    },
                )
                for row in read_json(path)
            ]
        check_unique(path, [question.id for question in questions])
        return questions

    def show_truth(self, question: Question) -> str:
        """The most frequent of the ten answers."""
        return most_common(question.truth)

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        """Both rules are the same."""
        score = vqa.vizwiz(text(prediction), question.truth)
        return score, score

    def details(
        self, rule: str, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> dict[str, float | None]:
        """Return average precision and F1 of "unanswerable", the answer said or not said."""
        said = [vqa.vizwiz_words(text(predictions[q.id])) == "unanswerable" for q in questions]
        true = [question.type == "unanswerable" for question in questions]
        return {
            "unanswerable_average_precision": average_precision(said, true),
            "unanswerable_f1": confusion(said, true)["f1"],
        }
