"""The score journey: a predictions file and a benchmark's annotations -> scores. Needs no model, and no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cobra.config import ScoreConfig
from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark, Question, Scores
from cobra.eval.predictions import read_predictions
from cobra.runtime import write_text

log = logging.getLogger(__name__)


def score(config: ScoreConfig, benchmark: Benchmark) -> dict[str, Any]:
    """Score a predictions file; write `scores.jsonl` and `results.json` where `output` says.

    Returns: `{"benchmark", "questions", "rules"}`; numbers are in percent, apart from counts.

    Raises:
        DataError: annotations are missing, or predictions are broken or do not fit.
    """
    path = Path(config.predictions).expanduser()
    if not path.is_file():  # said before large annotations are read
        raise DataError(f"predictions={path} is no file.")
    questions = benchmark.some_questions()
    predictions = read_predictions(path, benchmark, questions, allow_partial=config.allow_partial)
    for problem in predictions.problems():
        log.warning("Left out: %s", problem)
    answered = [question for question in questions if question.id in predictions.answers]
    scores = benchmark.score(predictions.answers, answered)
    results = {"benchmark": benchmark.name, "questions": len(answered), "rules": scores.as_dict()}
    left_out = {
        kind: len(getattr(predictions, kind))
        for kind in ("missing", "doubled", "unknown", "broken")
        if getattr(predictions, kind)
    }
    results |= {"left_out": left_out} if left_out else {}
    log_scores(benchmark, scores)
    if config.output is not None:
        write_scores(Path(config.output), benchmark, answered, scores)
        write_text(Path(config.output) / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def log_scores(benchmark: Benchmark, scores: Scores) -> None:
    """Say each part's accuracy by each rule, with its interval."""
    for rule, parts in scores.parts.items():
        for part, numbers in parts.items():
            low, high = numbers.interval
            log.info(
                "  %-8s %-20s %6.2f %%   (%.2f to %.2f)   of %s",
                rule, part or benchmark.name, numbers.accuracy, low, high, f"{numbers.num_questions:,}",
            )  # fmt: skip


def write_scores(
    folder: Path, benchmark: Benchmark, questions: Sequence[Question], scores: Scores, *, with_image: bool = False
) -> None:
    """Write scores.jsonl: one line per question, its score from 0 to 1 by each rule.

    Args:
        folder: made if it is not there.
        benchmark: knows how ids are written.
        questions: those that were answered.
        scores: of their answers.
        with_image: add what `scripts/compare.py` groups by: the image, the part, and whether the question counts.
    """
    lines: list[str] = []
    for question in questions:
        row = benchmark.id_fields(question)
        row |= {rule: values[question.id] for rule, values in scores.per_question.items()}
        if with_image:
            row |= {"image": question.image.name, "part": question.part, "counts": question.is_counted}
        lines.append(json.dumps(row))
    write_text(folder / "scores.jsonl", "\n".join(lines) + "\n")
