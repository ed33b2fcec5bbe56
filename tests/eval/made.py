"""A made-up benchmark with parts, types and boxes, its answers and its evaluation folders; no model is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cobra.eval import report
from cobra.eval.benchmark import MEAN, Benchmark, Prediction, Question, Scores, text
from cobra.eval.rules.boxes import BoxXYXY
from cobra.eval.scoring import write_scores


@dataclass
class Made(Benchmark):
    """Six questions about each of `num_images` images: four in the part `a`, two in `b`."""

    mean_of_parts = True
    columns = {"POPE": MEAN}  # noqa: RUF012
    folder: Path
    num_images: int = 10
    num_types: int = 3
    name: str = "made"

    def questions(self) -> list[Question]:
        self.folder.mkdir(exist_ok=True)
        questions: list[Question] = []
        for i in range(self.num_images):
            image = self.folder / f"{i}.png"
            if not image.exists():
                Image.new("RGB", (600 + i, 300), (9 * i % 256, 90, 160)).save(image)
            questions += [
                Question(
                    id=f"{i}/{j}",
                    image=image,
                    text=f"What is number {j} of image {i}?",
                    truth=f"thing {j}",
                    part="b" if j > 3 else "a",
                    types={"kind | $x_$": f"type {(6 * i + j) % self.num_types} | $"},
                )
                for j in range(6)
            ]
        return questions

    def true_box(self, question: Question) -> BoxXYXY:
        return (0.25, 0.5, 0.75, 1.0)

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        """The official rule wants the same answer; the paper's is content with its first word."""
        answer = text(prediction)
        return float(answer == question.truth), float(answer.split(" ")[0] == "thing")


def write_evaluation(
    folder: Path, benchmark: Benchmark, answers: Mapping[str, Prediction], model: str = "runs/made"
) -> None:
    """Write what an evaluation of these answers writes."""
    questions = [question for question in benchmark.questions() if question.id in answers]
    facts = {"benchmark": benchmark.name, "model": model, "limit": None}
    scores = benchmark.score(answers, questions)
    report.write(folder, facts, benchmark, questions, answers, scores, f"{model} on {benchmark.name}")


def write_numbers(folder: Path, benchmark: Benchmark, answers: Mapping[str, Prediction]) -> Scores:
    """Write of an evaluation only what a comparison reads: no pictures."""
    questions = [question for question in benchmark.questions() if question.id in answers]
    scores = benchmark.score(answers, questions)
    write_scores(folder, benchmark, questions, scores, with_image=True)
    results = report.results_of({"benchmark": benchmark.name, "model": folder.name}, benchmark, scores)
    (folder / "results.json").write_text(json.dumps(results))
    return scores
