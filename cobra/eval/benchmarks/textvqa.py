"""TextVQA, validation 0.5.1: 5,000 questions about 3,166 images, asked with and without read text (textvqa.org)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cobra.config import one_of
from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark, FreeText, Prediction, Question, most_common, text
from cobra.eval.files import Source, check_unique, expecting, locate, read_json, read_json_lines, whole_number
from cobra.eval.rules import vqa

FOLDER = "text-vqa"
ANNOTATIONS = Source(("TextVQA_0.5.1_val.json",), "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json")
OCR = Source(
    ("textvqa_val_v051_ocr.jsonl", "llava_textvqa_val_v051_ocr.jsonl"),
    "https://gist.github.com/siddk/74a709cb5e292099bae3cbcec1d0ce8a (LLaVA's file, eval.zip, will do)",
)
IMAGES = Source(
    ("train_val_images", "train_images", "../llava-v1.5-instruct/textvqa/train_images"),
    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
)
OCR_LABEL = "\nReference OCR token:"
ORDERS = ("ocr_first", "ocr_last", "no_ocr")
NUM_ANSWERS = 10


@dataclass
class TextVQA(Benchmark):
    """Accuracy against ten human answers, for each prompt order. Official: M4C's evaluator, facebookresearch/mmf."""

    columns: ClassVar[Mapping[str, str]] = {"TextVQA": "ocr_first"}
    image_url: ClassVar[str] = IMAGES.url
    data_root: str  # holds text-vqa/, or is that folder
    prompts: Mapping[str, str]  # for each order what is asked, with {question} and {ocr} in it
    orders: list[str] = field(default_factory=lambda: list(ORDERS))  # the text that was read first, last, or not given
    name: str = "textvqa"  # of its folder below `paths.results`
    max_new_tokens: int = 128  # limit of an answer

    def __post_init__(self) -> None:
        for order in self.orders:
            one_of("benchmark.orders", order, ORDERS)

    def questions(self) -> list[Question]:
        """Read the annotations and, in the same order, the text that an OCR system found."""
        (path, ocr_path), images = locate(self.data_root, FOLDER, [ANNOTATIONS, OCR], IMAGES)
        answer = FreeText(max_new_tokens=self.max_new_tokens)
        with expecting(path, "TextVQA's validation file"):
            rows: list[Any] = read_json(path)["data"]
            ids = [whole_number(row["question_id"]) for row in rows]
            images_of_rows, truths = [row["image_id"] for row in rows], [_truth(row) for row in rows]
        check_unique(path, list(map(str, ids)))
        with expecting(ocr_path, "the OCR file of TextVQA's validation set"):
            texts = [(row["question_id"], *_split(row["text"])) for row in read_json_lines(ocr_path)]
        if images_of_rows != [image for image, _, _ in texts]:
            raise DataError(
                f"{ocr_path} is not in the order of {path}; is it of another version? Get it from {OCR.url}."
            )
        return [
            Question(
                id=f"{number}/{order}",
                image=images / f"{image}.jpg",
                text=_fill(self.prompts[order], question=question, ocr=tokens),
                answer=answer,
                truth=truth,
                part=order,
            )
            for order in self.orders
            for number, truth, (image, question, tokens) in zip(ids, truths, texts, strict=True)
        ]

    def row_id(self, row: Mapping[str, Any]) -> str:
        """A question is asked once in each order, which `prompt` names."""
        return f"{row['question_id']}/{row['prompt']}"

    def id_fields(self, question: Question) -> dict[str, Any]:
        """Ids are numbers."""
        return {"question_id": int(question.id.partition("/")[0]), "prompt": question.part}

    def show_truth(self, question: Question) -> str:
        """The most frequent of the ten answers."""
        return most_common(question.truth)

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        """Both rules are the same."""
        score = vqa.textvqa(text(prediction), question.truth)
        return score, score


def _truth(row: dict[str, Any]) -> tuple[str, ...]:
    answers: list[Any] = row["answers"]
    if len(answers) != NUM_ANSWERS or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"question {row['question_id']} has not {NUM_ANSWERS} texts for answers")
    return tuple(answers)


def _fill(prompt: str, **values: str) -> str:
    """Put the question and the OCR tokens into a prompt, in one go: either may hold the other's place in braces."""
    return re.sub(r"\{(ocr|question)\}", lambda place: values[place[1]], prompt)


def _split(text: str) -> tuple[str, str]:
    """Return question and OCR tokens. LLaVA's file has the answer instruction behind them, which is not ours."""
    question, _, rest = text.partition(OCR_LABEL)
    return question, rest.partition("\n")[0].strip()
