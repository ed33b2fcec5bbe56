"""VQA-v2, validation 2014: 214,354 questions about 40,504 COCO images (visualqa.org/download.html)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any, ClassVar

from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark, FreeText, Prediction, Question, most_common, text
from cobra.eval.files import Source, check_unique, expecting, locate, read_json, some_answers, whole_number
from cobra.eval.rules.vqa import vqav2_official, vqav2_paper

FOLDER = "vqa-v2"
QUESTIONS = Source(
    ("v2_val2014_questions.json", "v2_OpenEnded_mscoco_val2014_questions.json"),
    "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Questions_Val_mscoco.zip",
)
ANNOTATIONS = Source(
    ("v2_val2014_annotations.json", "v2_mscoco_val2014_annotations.json"),
    "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Annotations_Val_mscoco.zip",
)
IMAGES = Source(("images_val2014", "val2014", "../coco/val2014"), "http://images.cocodataset.org/zips/val2014.zip")


@dataclass
class VQAv2(Benchmark):
    """Accuracy against ten human answers. Official: vqaEval.py of GT-Vision-Lab/VQA."""

    columns: ClassVar[Mapping[str, str]] = {"VQA-v2": ""}
    image_url: ClassVar[str] = IMAGES.url
    data_root: str  # holds vqa-v2/, or is that folder
    prompt: str  # what is asked, with {question} in it
    name: str = "vqav2"  # of its folder below `paths.results`
    max_new_tokens: int = 128  # limit of an answer

    def questions(self) -> list[Question]:
        """Read both files; the order is that of the annotations."""
        (questions, annotations), images = locate(self.data_root, FOLDER, [QUESTIONS, ANNOTATIONS], IMAGES)
        with expecting(questions, "VQA-v2's questions file"):
            texts = {row["question_id"]: row["question"] for row in read_json(questions)["questions"]}
        with expecting(annotations, "VQA-v2's annotations file"):
            rows = read_json(annotations)["annotations"]
            differing = texts.keys() ^ {row["question_id"] for row in rows}
            if differing:
                raise DataError(
                    f"{questions} and {annotations} belong to different splits: {len(differing):,} question ids are in "
                    f"one of them only, for example {min(differing)}."
                )
            result = self._questions(rows, texts, images)
        check_unique(annotations, [question.id for question in result])
        return result

    def _questions(self, rows: list[Any], texts: dict[int, str], images: Path) -> list[Question]:
        paths: dict[int, Path] = {}  # shared: an image has five questions
        answer = FreeText(max_new_tokens=self.max_new_tokens)
        kinds: dict[tuple[str, str], dict[str, str]] = {}
        result: list[Question] = []
        for row in rows:
            number = row["image_id"]
            if number not in paths:
                paths[number] = images / f"COCO_val2014_{number:012d}.jpg"
            kind = (row["answer_type"], row["question_type"])
            types = kinds.setdefault(kind, {"answer type": kind[0], "question type": kind[1]})
            result.append(
                Question(
                    id=str(whole_number(row["question_id"])),
                    image=paths[number],
                    text=self.prompt.replace("{question}", texts[row["question_id"]]),
                    answer=answer,
                    truth=_truth(some_answers(row, row["question_id"])),
                    types=types,
                )
            )
        return result

    def id_fields(self, question: Question) -> dict[str, Any]:
        """Ids are numbers."""
        return {"question_id": int(question.id)}

    def show_truth(self, question: Question) -> str:
        """The most frequent of the ten answers."""
        return most_common(question.truth[0])

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        """Score by both rules."""
        answer = text(prediction)
        return vqav2_official(answer, *question.truth), vqav2_paper(answer, *question.truth)


def _truth(answers: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[Any, ...] | None]:
    """Return what people said, and their entries where some could be equal: the script compares whole entries."""
    texts = tuple(intern(entry["answer"]) for entry in answers)
    if len({entry.get("answer_id") for entry in answers}) == len(answers):
        return texts, None
    others = (tuple((key, entry[key]) for key in sorted(entry) if key != "answer") for entry in answers)
    return texts, tuple(others)
