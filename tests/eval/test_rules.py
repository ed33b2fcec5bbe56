"""The scoring rules by themselves: quirks that are part of the score, curves, boxes, intervals."""

from __future__ import annotations

import numpy as np
import pytest

from cobra.eval.rules import gqa
from cobra.eval.rules.binary import areas, average_precision, confusion, roc_auc, says, share
from cobra.eval.rules.boxes import iou, normalise, parse_box, rounded
from cobra.eval.rules.intervals import interval
from cobra.eval.rules.vqa import leave_one_out, textvqa_words, vizwiz_words, vqav2_official, vqav2_paper
from cobra.eval.rules.words import CONTRACTIONS, rewrite_words, strip_punctuation


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        (".5", ".5"),
        ("5.", "5"),
        ("3.5.", "3.5"),
        ("u.s.a.", "usa"),
        ("." * 40, "." * 8),  # only the first 32 go
        ("1,000", "1000"),
        ("1,000-ft", "1000ft"),  # a comma between digits: no spaces for any sign
        ("black-white", "black white"),
        ("black -white", "black white"),  # it touches a space: deleted
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("it's 50%", "it's 50%"),
        ("a_b", "a b"),
    ],
)
def test_strip_punctuation(text: str, stripped: str) -> None:
    assert strip_punctuation(text) == stripped


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("None", "0"),
        ("The  Two dogs", "2 dogs"),
        ("dont", "don't"),
        ("Im", "im"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_rewrite_words(text: str, rewritten: str) -> None:
    assert rewrite_words(text) == rewritten


def test_contractions_are_those_of_the_scripts() -> None:
    assert len(CONTRACTIONS) == 114
    assert {"hes", "ows'at", "'ows'at", "twas", "shed've", "y'allll"} - set(CONTRACTIONS) == {"ows'at"}


def test_vizwiz_writes_back_ticks() -> None:
    assert [vizwiz_words(word) for word in ("doesnt", "weve", "couldn'tve", "I'm", "`quoted`")] == [
        "doesn`t", "we've", "couldn`t`ve", "i'm", "quoted",
    ]  # fmt: skip


def test_textvqa_splits_the_genitive() -> None:
    assert textvqa_words("John's, 1,000?") == "john 's 1000"


def test_leave_one_out() -> None:
    truths = ["a"] * 3 + ["b"] * 7
    assert leave_one_out("a", truths) == sum([2 / 3] * 3 + [1] * 7) / 10
    assert leave_one_out("c", truths) == 0 and leave_one_out("b", truths) == 1


def test_equal_entries_are_left_out_together() -> None:
    truths = ["a"] * 3 + ["b"] * 7
    assert leave_one_out("a", truths, list(range(10))) == leave_one_out("a", truths)
    assert leave_one_out("a", truths, [0] * 10) == pytest.approx(0.7)  # each `a` leaves no other one


def test_rules_of_vqav2_differ() -> None:
    assert (vqav2_official("the dog", ["dog"] * 10), vqav2_paper("the dog", ["dog"] * 10)) == (0, 1)
    mixed = ["the dog"] * 9 + ["cat"]
    assert (vqav2_official("a dog", mixed), vqav2_paper("a dog", mixed)) == (1, 0)


def test_areas_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 8, 60) / 8  # many ties
        true = rng.random(60) < 0.3 + 0.4 * scores
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[true] for b in scores[~true]]
        assert roc_auc(scores.tolist(), true.tolist()) == pytest.approx(100 * np.mean(pairs))
        total = last = 0.0
        for threshold in sorted(set(scores.tolist()), reverse=True):
            found = scores >= threshold
            recall = (found & true).sum() / true.sum()
            total, last = total + (recall - last) * (found & true).sum() / found.sum(), recall
        assert average_precision(scores.tolist(), true.tolist()) == pytest.approx(100 * total)


def test_areas_need_both_classes() -> None:
    assert areas([0.1, 0.2], [True, True]) == {"roc_auc": None, "pr_auc": 100}
    assert areas([0.1, 0.2], [False, False]) == {"roc_auc": None, "pr_auc": None}


def test_confusion() -> None:
    numbers = confusion([True, True, False, False], [True, False, True, False])
    assert numbers == {"precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50}
    assert confusion([False], [True]) == {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_a_tie_counts_as_positive() -> None:
    assert says({"Yes": 0.5, "No": 0.5}, "Yes", "No") and not says({"Yes": 0.499, "No": 0.501}, "Yes", "No")
    assert share({"Yes": 0.1, "No": 0.3}, "Yes", "No") == 0.25


@pytest.mark.parametrize(
    "answer",
    [
        "", "no", "[0.1, 0.2, 0.3]", "[0.1, 0.2, nan, 0.4]", "(0.1, 0.2, 0.3, 0.4)", "[0.3, 0.2, 0.1, 0.4]",
        "[0, 0, 1, 1.01]", "[0.1, 0.2, 0.3, 1j]", "[" * 10_000, "-" * 10_000 + "1", "9" * 10_000, "[\0]",
        "__import__('os').system('true')", "[[0.1], 0.2, 0.3, 0.4]", "['0', 0, 1, 1]", "{0: 1}", "\ud83d", "é" * 10_000,
        "[1e-200, 1e-200, 1e999, 1]",
    ],
)  # fmt: skip
def test_no_box(answer: str) -> None:
    assert parse_box(answer) is None


def test_boxes() -> None:
    assert parse_box("  [0,0,True,0x1]\n") == (0, 0, 1, 1)
    true = normalise((10, 20, 30, 40), 100, 80)
    assert true == (0.1, 0.25, 0.4, 0.75)
    assert rounded((0.404, 0.1, 0.396, 0.9)) == (0.4, 0.1, 0.4, 0.9)
    assert iou((0, 0, 0.5, 1), (0, 0, 1, 1)) == 0.5
    assert iou((0, 0, 0.1, 0.1), (0.5, 0.5, 1, 1)) == 0
    assert iou((0, 0, 1e-200, 1e-200), (0.3, 0.3, 0.3, 0.5)) == 0  # areas vanish


def test_interval_draws_images() -> None:
    scores, images = [1.0, 0.0] * 50, [i // 2 for i in range(100)]
    assert interval(scores, images, [""] * 100) == (50, 50)  # every image is half right
    low, high = interval(scores, list(range(100)), [""] * 100)
    assert 38 < low < 42 and 58 < high < 62
    assert interval(scores, list(range(100)), [""] * 100) == (low, high)


def test_gqa_details() -> None:
    assert gqa.clean(" T-shirt! ") == " tshirt "
    steps = [
        {"operation": "select", "argument": "table (1)"},
        {"operation": "exist", "argument": "?"},
        {"operation": "choose name", "argument": "x"},
        {"operation": "query", "argument": "name"},
        {"operation": "query", "argument": "color"},
    ]
    assert gqa.num_steps(steps) == 2
    assert gqa.belongs("color", ["red"], "twoCommon") and not gqa.belongs("red", ["red"], "twoCommon")
    rows = [("g", "a", "a"), ("g", "a", "b"), ("h", "c", "c")]
    assert gqa.distribution(rows) == pytest.approx((2 * (1 - 2) ** 2 / 2 + 0) / 3 / 100)
    assert gqa.distribution([]) is None
