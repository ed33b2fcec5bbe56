"""The benchmarks read their miniatures, and who knows the truth scores 100 % by the official rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from official import FOLDERS, configured

from cobra.data.toy import Toy, prepare
from cobra.eval.benchmark import Choices, Prediction, Question


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare(
        folder := tmp_path_factory.mktemp("data") / "toy",
        Toy(train=10, vqav2=20, gqa=4, vizwiz=30, textvqa=12, vsr=12, pope=8, refcoco=8),
    )
    return folder


def truth(name: str, question: Question, shown: str) -> Prediction:
    """What somebody would answer who has read the annotations."""
    if isinstance(question.answer, Choices):
        return {word: float(word == shown) for word in question.answer.words}
    return shown.partition(" (")[0] if name in ("vqav2", "vizwiz", "textvqa") else shown  # "red (8), blue (2)"


@pytest.mark.parametrize("name", FOLDERS)
def test_truth_scores_everything(toy: Path, name: str) -> None:
    splits = {"splits": ["val", "testA", "testB", "test"]} if name == "refcoco" else {}
    benchmark = configured(name, toy, **splits)
    questions = benchmark.questions()
    assert all(question.image.is_file() for question in questions)
    predictions = {question.id: truth(name, question, benchmark.show_truth(question)) for question in questions}
    scores = benchmark.score(predictions, questions)
    assert {part: score.accuracy for part, score in scores.parts["official"].items()} == dict.fromkeys(
        scores.parts["official"], pytest.approx(100)
    )
    if name == "gqa":
        details = scores.parts["official"][""].details
        assert (details["validity"], details["plausibility"], details["consistency"]) == (100, 100, 100)
    if name == "refcoco":
        assert set(scores.parts["official"]) == {
            *("RefCOCO", "RefCOCO testA", "RefCOCO testB", "RefCOCO+", "RefCOCO+ testA", "RefCOCO+ testB"),
            *("RefCOCOg", "RefCOCOg test"),
        }


def test_vsr_has_a_second_split(toy: Path) -> None:
    assert len(configured("vsr", toy, split="dev").questions()) == 12
