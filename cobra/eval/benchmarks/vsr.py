"""VSR, zero-shot test: 1,222 true or false statements about 715 images (cambridgeltl/visual-spatial-reasoning)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cobra.eval.benchmark import Choices, Question
from cobra.eval.files import Source, expecting, locate, read_json_lines
from cobra.eval.two_words import TwoWords

FOLDER = "vsr"
ANNOTATIONS_URL = "https://huggingface.co/datasets/cambridgeltl/vsr_zeroshot"
IMAGES = Source(("images", "trainval2017"), "https://www.dropbox.com/s/0s3bj25s62crjh2/vsr_images.zip?dl=1")


@dataclass
class VSR(TwoWords):
    """Accuracy of the likelier of "True" and "False"; a tie counts as True."""

    columns: ClassVar[Mapping[str, str]] = {"VSR": ""}
    image_url: ClassVar[str] = IMAGES.url
    words: ClassVar[tuple[str, str]] = ("True", "False")
    data_root: str  # holds vsr/, or is that folder
    prompt: str  # what is asked, with {question} in it
    split: str = "test"  # "test" | "dev": {split}.jsonl
    name: str = "vsr"  # of its folder below `paths.results`

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
                    answer=Choices(words=self.words),
                    truth=int(row["label"]) == 1,
                    types={"relation": row["relation"]},
                )
                for number, row in enumerate(read_json_lines(path))
            ]

    def id_fields(self, question: Question) -> dict[str, Any]:
        """Ids are numbers."""
        return {"question_id": int(question.id)}
