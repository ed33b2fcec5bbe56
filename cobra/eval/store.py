"""Answers on disk: one JSON line per question, written as soon as it is there, kept over restarts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cobra.errors import DataError
from cobra.runtime import write_text


class AnswerStore:
    """predictions.jsonl, and the fingerprint of what they were made with."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open the folder; answers found there count if they were made with the same fingerprint.

        Raises:
            DataError: they were made with another model, data or decoding.
        """
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
        self.answers = self._read()
        # A kill may have cut the last line short: write back what is whole, then append.
        write_text(self.path, "".join(_line(*item) for item in self.answers.items()))
        self._file = self.path.open("a", encoding="utf-8")

    def _read(self) -> dict[str, str]:
        answers: dict[str, str] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").split("\n"):
                try:
                    row = json.loads(line)
                    answers[row["question_id"]] = row["prediction"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
        return answers

    def append(self, answers: Iterable[tuple[str, str]]) -> None:
        """Keep (question id, prediction) pairs and write them at once."""
        for question_id, prediction in answers:
            self.answers[question_id] = prediction
            self._file.write(_line(question_id, prediction))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(question_id: str, prediction: str) -> str:
    return json.dumps({"question_id": question_id, "prediction": prediction}) + "\n"
