"""VSR, zero-shot test: 1,222 true or false statements about 715 images (cambridgeltl/visual-spatial-reasoning)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from cobra.eval.benchmark import Benchmark, Choices, Prediction, Question, probabilities
from cobra.eval.files import Source, expecting, locate, read_json_lines
from cobra.eval.rules.binary import areas, says, share

FOLDER = "vsr"
ANNOTATIONS_URL = "https://huggingface.co/datasets/cambridgeltl/vsr_zeroshot"
IMAGES = Source(("images", "trainval2017"), "https://www.dropbox.com/s/0s3bj25s62crjh2/vsr_images.zip?dl=1")
WORDS = ("True", "False")


@dataclass
class VSR(Benchmark):
    """Accuracy of the likelier of "True" and "False"; a tie counts as True."""

    columns: ClassVar[Mapping[str, str]] = {"VSR": ""}
    image_url: ClassVar[str] = IMAGES.url
    data_root: str
    prompt: str
    split: str = "test"  # {split}.jsonl
    name: str = "vsr"

    def questions(self) -> list[Question]:
        """Read the statements; a statement's id is its row number, from 0."""
        source = Source((f"{self.split}.jsonl",), ANNOTATIONS_URL)
        (path,), images = locate(self.data_root, FOLDER, [source], IMAGES)
        with expecting(path, "a file of VSR's statements"):
            return [
                Question(
                    id=str(number),
                    image=images / row["image"],
                    text=self.prompt.replace("{question}", row["caption"]),
                    answer=Choices(words=WORDS),
                    truth=int(row["label"]) == 1,
                    types={"relation": row["relation"]},
                )
                for number, row in enumerate(read_json_lines(path))
            ]

    def id_fields(self, question: Question) -> dict[str, Any]:
        """Ids are numbers."""
        return {"question_id": int(question.id)}

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
        """Return the areas under the curves, "True" being the positive class."""
        shares = [share(probabilities(predictions[question.id]), *WORDS) for question in questions]
        return areas(shares, [cast("bool", question.truth) for question in questions])
