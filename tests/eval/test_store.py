"""The folder of an evaluation: one writer at a time, answers that were made otherwise, answers to other questions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import Made
from official import config_of, configured, rows_of

from cobra.errors import DataError
from cobra.eval.benchmark import Choices, FreeText, Question
from cobra.eval.run import evaluate
from cobra.eval.store import AnswerStore


@pytest.fixture
def data_root(assets: Path) -> Path:
    return assets / "fixtures" / "scorers" / "data_root"


@pytest.fixture
def benchmark(tmp_path: Path) -> Made:
    return Made(tmp_path / "images", num_images=1)


def fill(folder: Path, benchmark: Made, questions: Iterable[Question], **fingerprint: Any) -> None:
    store = AnswerStore(folder, fingerprint, benchmark, list(questions))
    store.append((question.id, f"about {question.id}") for question in questions)
    store.join()
    store.close()


def stored(folder: Path) -> dict[str, str]:
    return {row["question_id"]: row["prediction"] for row in rows_of(folder)}


def test_second_writer_is_refused_until_the_first_is_gone(benchmark: Made, tmp_path: Path) -> None:
    questions = benchmark.questions()
    first = AnswerStore(tmp_path, {}, benchmark, questions)
    first.append([("0/0", "first")])
    (tmp_path / "predictions.rank1.jsonl").write_text('{"question_id": "0/1", "prediction": "of its second rank"}\n')
    with pytest.raises(DataError, match=rf"Another evaluation is writing into {tmp_path} at this moment\. Wait"):
        AnswerStore(tmp_path, {}, benchmark, questions)
    first.append([("0/2", "goes on")])
    assert stored(tmp_path) == {"0/0": "first", "0/2": "goes on"}
    first.join()
    with pytest.raises(DataError, match="Another evaluation"):  # while reports are written, too
        AnswerStore(tmp_path, {}, benchmark, questions)
    first.close()
    second = AnswerStore(tmp_path, {}, benchmark, questions)
    assert second.answers == {"0/0": "first", "0/1": "of its second rank", "0/2": "goes on"}
    second.close()


def test_lock_is_free_again_after_a_refusal(benchmark: Made, tmp_path: Path) -> None:
    fill(tmp_path, benchmark, benchmark.questions()[:1], model="a")
    with pytest.raises(DataError, match="another model;"):
        AnswerStore(tmp_path, {"model": "b"}, benchmark, benchmark.questions())
    AnswerStore(tmp_path, {"model": "a"}, benchmark, benchmark.questions()).close()


def test_lost_answers_are_an_error_that_says_what_to_do(
    trained_run: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cobra.eval.run.ask", lambda *_: None)
    with pytest.raises(DataError, match=r"lacks the answers to 24 of 24 questions, such as .*same command again"):
        evaluate(config_of(trained_run, tmp_path), configured("vsr", data_root))


def test_what_is_known_of_the_truth_may_grow(benchmark: Made, tmp_path: Path) -> None:
    questions = benchmark.questions()
    fill(tmp_path, benchmark, questions)
    elsewhere = [replace(q, truth=[q.truth], types={}, image=Path("moved") / q.image.name) for q in questions]
    store = AnswerStore(tmp_path, {}, benchmark, elsewhere)
    assert store.answers == {q.id: f"about {q.id}" for q in questions}
    store.close()


@pytest.mark.parametrize(
    "change",
    [{"text": "Another?"}, {"image": Path("another.png")}, {"answer": FreeText(max_new_tokens=9)},
     {"answer": Choices(words=("Yes", "No"))}],
)  # fmt: skip
def test_another_question_is_refused_where_it_was_answered(
    benchmark: Made, tmp_path: Path, change: dict[str, Any]
) -> None:
    questions = benchmark.questions()
    fill(tmp_path, benchmark, questions[:3])
    before = (tmp_path / "predictions.jsonl").read_bytes()
    changed = replace(questions[1], **change)
    with pytest.raises(DataError, match=r"answers other questions: of 1 that are asked now, such as 0/1,"):
        AnswerStore(tmp_path, {}, benchmark, [questions[0], changed, *questions[2:]])
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    unanswered = replace(questions[5], **change)
    AnswerStore(tmp_path, {}, benchmark, [*questions[:5], unanswered]).close()


def test_answers_without_a_record_of_their_questions_are_refused(benchmark: Made, tmp_path: Path) -> None:
    fill(tmp_path, benchmark, benchmark.questions())
    (tmp_path / "questions.json").unlink()
    with pytest.raises(DataError, match=r"answers other questions: of 6"):
        AnswerStore(tmp_path, {}, benchmark, benchmark.questions())


def test_answers_to_other_parts_stay(benchmark: Made, tmp_path: Path) -> None:
    questions = benchmark.questions()
    first, second = questions[:4], questions[2:]
    fill(tmp_path, benchmark, first)
    store = AnswerStore(tmp_path, {}, benchmark, second)
    assert store.answers.keys() == {"0/2", "0/3"}
    store.append([("0/5", "new")])
    store.join()
    store.close()
    assert stored(tmp_path) == {q.id: f"about {q.id}" for q in first} | {"0/5": "new"}
    with pytest.raises(DataError, match="such as 0/0,"):  # what they were asked is still known
        AnswerStore(tmp_path, {}, benchmark, [replace(questions[0], text="x"), *questions[1:]])


def test_splits_may_be_added_and_benchmarks_may_not(trained_run: Path, data_root: Path, tmp_path: Path) -> None:
    evaluate(config_of(trained_run, tmp_path, limit=6), configured("pope", data_root, splits=["random"]))
    before = rows_of(tmp_path)
    evaluate(config_of(trained_run, tmp_path, limit=12), configured("pope", data_root))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_questions"] == 12 and len(rows_of(tmp_path)) == 6 + results["asked_now"]
    assert [row for row in rows_of(tmp_path) if row in before] == before
    with pytest.raises(DataError, match="another benchmark;"):
        evaluate(config_of(trained_run, tmp_path), configured("vsr", data_root))
