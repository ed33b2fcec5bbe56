"""Answers on disk: the predictions file of `scripts/score.py`, each row written as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark, Prediction, Question
from cobra.eval.fingerprint import question_digests
from cobra.eval.predictions import Predictions, read_rows, write_row
from cobra.ranks import Ranks
from cobra.runtime import write_text

ALONE = Ranks()

_ANOTHER_FOLDER = "delete the folder, or choose another one with output=..."


class AnswerStore:
    """predictions.jsonl, and the fingerprints of what the answers were made with; kept over restarts.

    The first rank holds the folder's lock until `close`. It writes into the file itself, each other rank into a part
    beside it, which the first rank joins to it at the end or at the next start. All ranks see the same folder.
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
            fingerprint: what all answers depend on, by name; only the first rank's counts.
            benchmark: knows how ids are written.
            questions: all that answers may be stored to; answers to others that are there stay.
            ranks: the processes that answer together.

        Raises:
            DataError: the answers were made with another model or other questions, or somebody else writes here.
        """
        self.benchmark, self.ranks = benchmark, ranks
        self.path = folder / "predictions.jsonl"
        self._questions = {question.id: question for question in questions}
        self._lock: BaseFileLock = FileLock(folder / ".lock", timeout=0)
        if ranks.is_first:
            self._take_lock()
            try:
                self._open(fingerprint)
            except BaseException:
                self._lock.release()
                raise
        ranks.barrier()
        self.answers = self._read([self.path], self._questions).answers
        part = self.path if ranks.is_first else folder / f"predictions.rank{ranks.rank}.jsonl"
        self._file = part.open("a", encoding="utf-8")

    def append(self, answers: Iterable[tuple[str, Prediction]]) -> None:
        """Keep (question id, prediction) pairs and write them at once."""
        for question_id, prediction in answers:
            self.answers[question_id] = prediction
            self._file.write(self._line(question_id, prediction))
        self._file.flush()

    def join(self) -> None:
        """After the last answer, wait for the other ranks and take over theirs; the file has the questions' order."""
        self._file.close()
        self.ranks.barrier()
        if self.ranks.is_first:
            self._join_parts(self._questions)
        self.ranks.barrier()
        self.answers = self._read([self.path], self._questions).answers

    def close(self) -> None:
        """Close the file and let others write into the folder."""
        self._file.close()
        self._lock.release()

    def _take_lock(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()  # type: ignore[reportUnknownMemberType]
        except Timeout:
            raise DataError(
                f"Another evaluation is writing into {self.path.parent} at this moment. Wait for it, stop it, or "
                "choose another folder with output=..."
            ) from None

    def _open(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse answers that were made otherwise, and take over those of ranks that were killed."""
        folder = self.path.parent
        stamp, asked = folder / "fingerprint.json", folder / "questions.json"
        wanted: dict[str, Any] = json.loads(json.dumps(fingerprint))
        if any(folder.glob("predictions*.jsonl")):
            found = _read_object(stamp)
            different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            if different:
                raise DataError(
                    f"{folder} holds predictions made with another {', '.join(different)}; {_ANOTHER_FOLDER}"
                )
        before, now = _read_object(asked), question_digests(self._questions.values())
        self._join_parts({one: q for one, q in self._questions.items() if before.get(one) == now[one]})
        if not now.items() <= before.items():
            write_text(asked, json.dumps(before | now) + "\n")
        write_text(stamp, json.dumps(wanted, indent=2) + "\n")

    def _join_parts(self, same: Mapping[str, Question]) -> None:
        """Write all answers into one file; `same` has the questions that are what they were when they were asked."""
        parts = sorted(self.path.parent.glob("predictions.rank*.jsonl"))
        found = self._read([self.path, *parts], same)
        changed = [one for one in found.unknown if one in self._questions]
        if changed:
            raise DataError(
                f"{self.path} answers other questions: of {len(changed):,} that are asked now, such as {changed[0]}, "
                f"the text, the image's name or the kind of answer is another; {_ANOTHER_FOLDER}"
            )
        # A kill may have cut a last line short; only what is whole is written back.
        lines = [self._line(one, found.answers[one]) for one in self._questions if one in found.answers]
        write_text(self.path, "".join([*lines, *dict.fromkeys(found.unknown_lines)]))
        for part in parts:
            part.unlink()

    def _read(self, paths: Iterable[Path], questions: Mapping[str, Question]) -> Predictions:
        result = Predictions()
        for path in paths:
            if path.exists():
                found = read_rows(path, self.benchmark, questions)
                result.answers |= found.answers
                result.unknown += found.unknown
                result.unknown_lines += found.unknown_lines
        return result

    def _line(self, question_id: str, prediction: Prediction) -> str:
        return write_row(self.benchmark, self._questions[question_id], prediction)


def _read_object(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
