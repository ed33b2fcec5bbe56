"""A predictions file and the questions it answers: every row read and checked, every id accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, cast

from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark, Choices, Prediction, Question

_LARGEST = 1.01  # of a probability: bfloat16 rounds to 1/128
_MAX_SHOWN = 200  # characters of a wrong value


@dataclass
class Predictions:
    """Answers by question id, and what was wrong with the file."""

    answers: dict[str, Prediction] = field(default_factory=dict[str, Prediction])
    missing: list[str] = field(default_factory=list[str])
    doubled: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])
    unknown_lines: list[str] = field(default_factory=list[str])  # the rows of these
    broken: list[str] = field(default_factory=list[str])  # lines that are no JSON

    def problems(self) -> list[str]:
        """Say what was wrong, one line for each kind."""
        kinds = {"missing": self.missing, "doubled": self.doubled, "unknown": self.unknown}
        found = [
            f"{len(ids):,} {kind} id{'s' * (len(ids) > 1)}: {', '.join(ids[:5])}{', ...' * (len(ids) > 5)}"
            for kind, ids in kinds.items()
            if ids
        ]
        return found + self.broken[:5] + [f"... and {len(self.broken) - 5} more lines"] * (len(self.broken) > 5)


def read_predictions(
    path: Path, benchmark: Benchmark, questions: Sequence[Question], *, allow_partial: bool = False
) -> Predictions:
    """Read JSON lines `{"question_id", "prediction"}` or `{"question_id", "probabilities"}`.

    Args:
        path: the file.
        benchmark: knows how ids are written.
        questions: what should be answered.
        allow_partial: report missing, doubled and unknown ids and broken lines instead of refusing them; of doubled
            ids the first row counts.

    Raises:
        DataError: the file cannot be read, a row has another form, or ids are missing, doubled or unknown.
    """
    asked = {question.id: question for question in questions}
    result = read_rows(path, benchmark, asked)
    result.missing = [one for one in asked if one not in result.answers]
    if not result.answers:
        raise DataError(
            f"{path} answers none of the {len(asked):,} questions of {benchmark.name}; is it the file of another "
            f"benchmark? Its ids look like {', '.join(result.unknown[:3]) or '(none)'}, those of {benchmark.name} like "
            f"{', '.join(list(asked)[:3])}."
        )
    if result.problems() and not allow_partial:
        raise DataError(
            "\n  ".join([f"{path} does not fit {benchmark.name} (allow_partial=true scores what does):"])
            + "".join(f"\n  {problem}" for problem in result.problems())
        )
    return result


def read_rows(path: Path, benchmark: Benchmark, asked: Mapping[str, Question]) -> Predictions:
    """Read the answers to the questions of `asked`, which has them by id, and what else the file holds.

    Raises:
        DataError: the file cannot be read, or a row has another form.
    """
    result = Predictions()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"predictions={path} cannot be read: {error.strerror}.") from None
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            result.broken.append(f"{where}, is not JSON: {error}")
            continue
        _add(row, where, benchmark, asked, result)
    return result


def write_row(benchmark: Benchmark, question: Question, prediction: Prediction) -> str:
    """Return the line of a predictions file that `read_rows` reads."""
    key = "prediction" if isinstance(prediction, str) else "probabilities"
    return json.dumps(benchmark.id_fields(question) | {key: prediction}) + "\n"


def _add(row: Any, where: str, benchmark: Benchmark, asked: Mapping[str, Question], result: Predictions) -> None:
    try:
        one = benchmark.row_id(row)
    except (KeyError, TypeError) as error:
        missing = error if isinstance(error, KeyError) else "'question_id'"
        forms = [_form(question, benchmark) for question in list(asked.values())[:1]]
        raise DataError("; a row is ".join([f"{where}, has no {missing}", *forms])) from None
    if one not in asked:
        result.unknown.append(one)
        result.unknown_lines.append(json.dumps(row) + "\n")
    elif one in result.answers:
        result.doubled.append(one)
    else:
        result.answers[one] = _prediction(row, where, asked[one], benchmark)


def _prediction(row: dict[str, Any], where: str, question: Question, benchmark: Benchmark) -> Prediction:
    key = "probabilities" if isinstance(question.answer, Choices) else "prediction"
    try:
        return checked(question, row.get(key))
    except DataError as error:
        raise DataError(f"{where}, {key}: {error} A row is {_form(question, benchmark)}") from None


def checked(question: Question, prediction: object) -> Prediction:
    """Return an answer, if it is what the question asks for.

    Raises:
        DataError: it is no text, or these are not the probabilities of the question's words.
    """
    if not isinstance(question.answer, Choices):
        if isinstance(prediction, str):
            return prediction
        raise DataError(f"{_shown(prediction)} is no text.")
    words = question.answer.words
    values: Mapping[str, Any] = cast("Mapping[str, Any]", prediction) if isinstance(prediction, Mapping) else {}
    if set(values) != set(words):
        raise DataError(
            f"{_shown(cast('object', prediction))} does not give the probabilities of {' and '.join(words)}."
        )
    if not all(_is_probability(value) for value in values.values()) or not any(values.values()):
        raise DataError(
            f"{_shown(dict(values))} must be numbers from 0 to 1, and not all 0. NaN comes from a model that "
            "overflows: try dtype=float32."
        )
    return {word: float(values[word]) for word in words}


def _is_probability(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and bool(0 <= cast("float", value) <= _LARGEST)


def _shown(value: object) -> str:
    text = repr(value)
    return text[:_MAX_SHOWN] + "..." * (len(text) > _MAX_SHOWN)


def _form(question: Question, benchmark: Benchmark) -> str:
    """Show how a row should look."""
    answer = dict.fromkeys(question.answer.words, 0.5) if isinstance(question.answer, Choices) else "..."
    return write_row(benchmark, question, answer).strip()
