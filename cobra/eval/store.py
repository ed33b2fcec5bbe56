"""Answers on disk: the predictions file of `scripts/score.py`, each row written as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark, Prediction, Question
from cobra.eval.predictions import read_rows, write_row
from cobra.runtime import write_text


class AnswerStore:
    """predictions.jsonl, and the fingerprint of what they were made with; kept over restarts."""

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], benchmark: Benchmark, questions: Sequence[Question]
    ) -> None:
        """Open the folder; answers found there count if they were made with the same fingerprint.

        Args:
            folder: made if it is not there.
            fingerprint: what the answers depend on, by name.
            benchmark: knows how ids are written.
            questions: all that answers may be stored to.

        Raises:
            DataError: the answers were made with another model, data or decoding.
        """
        self.benchmark = benchmark
        self._questions = {question.id: question for question in questions}
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "predictions.jsonl"
        stamp = folder / "fingerprint.json"
        wanted: dict[str, Any] = json.loads(json.dumps(fingerprint))
        if self.path.exists():
            found: dict[str, Any] = json.loads(stamp.read_text()) if stamp.exists() else {}
            different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            if different:
                raise DataError(
                    f"{folder} holds predictions made with another {', '.join(different)}; "
                    "delete the folder, or choose another one with output=..."
                )
        write_text(stamp, json.dumps(wanted, indent=2) + "\n")
        self.answers: dict[str, Prediction] = {}
        if self.path.exists():
            self.answers = read_rows(self.path, benchmark, self._questions).answers
        # A kill may have cut the last line short: write back what is whole, then append.
        write_text(self.path, "".join(self._line(*item) for item in self.answers.items()))
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, answers: Iterable[tuple[str, Prediction]]) -> None:
        """Keep (question id, prediction) pairs and write them at once."""
        for question_id, prediction in answers:
            self.answers[question_id] = prediction
            self._file.write(self._line(question_id, prediction))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, question_id: str, prediction: Prediction) -> str:
        return write_row(self.benchmark, self._questions[question_id], prediction)
