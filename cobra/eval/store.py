"""Answers on disk: the predictions file of `scripts/score.py`, each row written as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark, Prediction, Question
from cobra.eval.predictions import read_rows, write_row
from cobra.ranks import Ranks
from cobra.runtime import write_text

ALONE = Ranks()


class AnswerStore:
    """predictions.jsonl, and the fingerprint of what the answers were made with; kept over restarts.

    The first rank writes into the file itself, each other one into a part beside it, which the first rank joins to it
    at the end or at the next start. All ranks see the same folder.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        benchmark: Benchmark,
        questions: Sequence[Question],
        ranks: Ranks = ALONE,
    ) -> None:
        """Open the folder; answers found there count if they were made with the same fingerprint.

        Args:
            folder: made if it is not there.
            fingerprint: what the answers depend on, by name; only the first rank's counts.
            benchmark: knows how ids are written.
            questions: all that answers may be stored to.
            ranks: the processes that answer together.

        Raises:
            DataError: the answers were made with another model, data or decoding.
        """
        self.benchmark, self.ranks = benchmark, ranks
        self.path = folder / "predictions.jsonl"
        self._questions = {question.id: question for question in questions}
        if ranks.is_first:
            _check(folder, fingerprint)
            self._join_parts()
        ranks.barrier()
        self.answers = self._read(self.path)
        part = self.path if ranks.is_first else folder / f"predictions.rank{ranks.rank}.jsonl"
        self._file = part.open("a", encoding="utf-8")

    def append(self, answers: Iterable[tuple[str, Prediction]]) -> None:
        """Keep (question id, prediction) pairs and write them at once."""
        for question_id, prediction in answers:
            self.answers[question_id] = prediction
            self._file.write(self._line(question_id, prediction))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def join(self) -> None:
        """After `close`, wait for the other ranks and take over their answers; the file has the questions' order."""
        self.ranks.barrier()
        if self.ranks.is_first:
            self._join_parts()
        self.ranks.barrier()
        self.answers = self._read(self.path)

    def _join_parts(self) -> None:
        parts = sorted(self.path.parent.glob("predictions.rank*.jsonl"))
        answers = self._read(self.path)
        for part in parts:
            answers |= self._read(part)
        # A kill may have cut a last line short; only what is whole is written back.
        write_text(self.path, "".join(self._line(one, answers[one]) for one in self._questions if one in answers))
        for part in parts:
            part.unlink()

    def _read(self, path: Path) -> dict[str, Prediction]:
        return read_rows(path, self.benchmark, self._questions).answers if path.exists() else {}

    def _line(self, question_id: str, prediction: Prediction) -> str:
        return write_row(self.benchmark, self._questions[question_id], prediction)


def _check(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "fingerprint.json"
    wanted: dict[str, Any] = json.loads(json.dumps(fingerprint))
    if any(folder.glob("predictions*.jsonl")):
        found: dict[str, Any] = json.loads(stamp.read_text()) if stamp.exists() else {}
        different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if different:
            raise DataError(
                f"{folder} holds predictions made with another {', '.join(different)}; "
                "delete the folder, or choose another one with output=..."
            )
    write_text(stamp, json.dumps(wanted, indent=2) + "\n")
