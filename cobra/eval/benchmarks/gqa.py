"""GQA, test-dev balanced: 12,578 questions about 398 images (cs.stanford.edu/people/dorarad/gqa)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from cobra.eval.benchmark import PAPER, Benchmark, FreeText, Prediction, Question, text
from cobra.eval.files import Source, expecting, locate, read_json
from cobra.eval.rules import gqa

FOLDER = "gqa"
QUESTIONS_URL = "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip"
IMAGES = Source(
    ("images", "../llava-v1.5-instruct/gqa/images"), "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"
)


@dataclass
class GQA(Benchmark):
    """Exact match; only balanced questions count. Official: eval.py of the data set, on the answers as they are.

    The paper's harness first lower-cases predictions and deletes ASCII punctuation, but strips no spaces and leaves the
    true answers alone, so that "t-shirt" can never be right.
    """

    columns: ClassVar[Mapping[str, str]] = {"GQA": ""}
    image_url: ClassVar[str] = IMAGES.url
    data_root: str  # holds gqa/, or is that folder
    prompt: str  # what is asked, with {question} in it
    tier: str = "testdev_balanced"  # {tier}_questions.json; with testdev_all, consistency can be computed
    name: str = "gqa"  # of its folder below `paths.results`
    max_new_tokens: int = 128  # limit of an answer

    def questions(self) -> list[Question]:
        """Read the questions; the file of valid and plausible answers too, where it is."""
        name = f"{self.tier}_questions.json"
        source = Source((name, f"questions1.2/{name}"), QUESTIONS_URL)
        (path,), images = locate(self.data_root, FOLDER, [source], IMAGES)
        choices_path = path.with_name(f"{self.tier.split('_')[0]}_choices.json")
        answer = FreeText(max_new_tokens=self.max_new_tokens)
        choices: dict[str, Any] = read_json(choices_path) if choices_path.is_file() else {}
        with expecting(path, "a file of GQA's questions"):
            return [
                Question(
                    id=number,
                    image=images / f"{row['imageId']}.jpg",
                    text=self.prompt.replace("{question}", row["question"]),
                    answer=answer,
                    truth={
                        "answer": row["answer"],
                        "detailed": row["types"]["detailed"] or "",
                        "group": row["groups"]["global"],
                        "entailed": [one for one in row["entailed"] if one != number],
                        **{kind: choices[number][kind] for kind in ("valid", "plausible") if number in choices},
                    },
                    types={
                        "answer": "open" if row["types"]["structural"] == "query" else "binary",
                        "structural": row["types"]["structural"],
                        "semantic": row["types"]["semantic"],
                        "steps": str(gqa.num_steps(row["semantic"])),
                        "words": str(len(row["question"].split())),
                    },
                    is_counted=row["isBalanced"],
                )
                for number, row in cast("dict[str, Any]", read_json(path)).items()
            ]

    def show_truth(self, question: Question) -> str:
        """The answer alone."""
        return question.truth["answer"]

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        """Score by both rules."""
        answer, truth = text(prediction), question.truth["answer"]
        return float(answer == truth), float(gqa.clean(answer) == truth)

    def details(
        self, rule: str, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> dict[str, float | None]:
        """Return distribution always; validity, plausibility and consistency where there is all that they need."""
        prepare: Callable[[str], str] = gqa.clean if rule == PAPER else str
        answers = {question.id: prepare(text(predictions[question.id])) for question in questions}
        counted = [question for question in questions if question.is_counted]
        groups = ((q.truth["group"], q.truth["answer"], answers[q.id]) for q in counted if q.truth["group"] is not None)
        numbers = {"distribution": gqa.distribution(groups)}
        for name, kind in (("validity", "valid"), ("plausibility", "plausible")):
            if all(kind in q.truth for q in counted):
                fitting = [gqa.belongs(answers[q.id], q.truth[kind], q.truth["detailed"]) for q in counted]
                numbers[name] = 100 * sum(fitting) / len(fitting)
        right = {q.id: answers[q.id] == q.truth["answer"] for q in questions}
        sources = [q.truth["entailed"] for q in counted if right[q.id] and q.truth["entailed"]]
        if sources and all(one in right for source in sources for one in source):
            shares = [sum(right[one] for one in source) / len(source) for source in sources]
            numbers["consistency"] = 100 * sum(shares) / len(shares)
        return numbers
