"""Comparing runs: the test and its correction against their definitions, what is compared, what is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from made import Made, write_numbers
from PIL import Image

from cobra.errors import DataError
from cobra.eval import compare
from cobra.eval.benchmark import Prediction
from cobra.eval.evaluations import read_runs
from cobra.eval.rules.intervals import holm, sign_flip


def by_definition(differences: list[float], images: list[str], parts: list[str]) -> float:
    """Try all signs of the images; the mean is that of the parts' means."""

    def mean(signs: dict[str, int]) -> float:
        values = defaultdict(list)
        for difference, image, part in zip(differences, images, parts, strict=True):
            values[part].append(signs[image] * difference)
        return abs(fmean(map(fmean, values.values())))

    names = sorted(set(images))
    found = mean(dict.fromkeys(names, 1))
    ways = [mean(dict(zip(names, signs, strict=True))) for signs in product((1, -1), repeat=len(names))]
    return fmean(way >= found - 1e-12 for way in ways)


def drawn(num_images: int, seed: int) -> tuple[list[float], list[str], list[str]]:
    rng = np.random.default_rng(seed)
    images = [str(i) for i in rng.integers(0, num_images, 4 * num_images)]
    parts = ["a" if draw < 0.7 else "b" for draw in rng.random(len(images))]
    return (rng.integers(-2, 4, len(images)) / 3).tolist(), images, parts


def test_sign_flip_equals_its_definition() -> None:
    for seed in range(6):
        case = drawn(6, seed)
        assert sign_flip(*case) == pytest.approx(by_definition(*case), abs=1e-12)
    values = {round(sign_flip(*drawn(6, seed)), 6) for seed in range(6)}
    assert len(values) > 3


def test_sampled_sign_flip_is_near_its_definition() -> None:
    case = drawn(13, 2)
    assert len(set(case[1])) == 13 and sign_flip(*case) == sign_flip(*case)
    assert sign_flip(*case) == pytest.approx(by_definition(*case), abs=0.02)


def test_sign_flip_takes_images_not_questions() -> None:
    """Twenty questions about one image are one observation."""
    assert sign_flip([1.0] * 20, ["x"] * 20, [""] * 20) == 1
    assert sign_flip([1.0] * 20, list(map(str, range(20))), [""] * 20) < 0.001
    assert sign_flip([0.0] * 5, list("abcde"), [""] * 5) == 1


def test_holm_equals_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1] and holm([]) == []


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write an evaluation in which a question is answered rightly where `is_right(image, number)`."""

    def write(name: str, is_right: Callable[[int, int], bool], /, **settings: Any) -> Path:
        benchmark = Made(tmp_path / "images", **settings)
        answers: dict[str, Prediction] = {}
        for question in benchmark.questions():
            image, number = map(int, question.id.split("/"))
            answers[question.id] = question.truth if is_right(image, number) else "thing x"
        folder = tmp_path / "results" / benchmark.name / name
        write_numbers(folder, benchmark, answers)
        return folder

    return write


def test_difference_is_that_of_the_headlines(tmp_path: Path, write: Callable[..., Path]) -> None:
    folders = [write("a", lambda i, j: i % 2 == 0), write("b", lambda i, j: i % 2 == 0 or j == 5)]
    (pair,) = compare.compare(read_runs([str(f) for f in folders], tmp_path, "official"), "official").pairs
    accuracies = [json.loads((folder / "results.json").read_text())["accuracy"] for folder in folders]
    assert [pair.first_accuracy, pair.second_accuracy] == pytest.approx(accuracies) == [50, 62.5]
    assert pair.difference == pytest.approx(12.5) and (pair.column, pair.questions) == ("POPE", 60)
    assert pair.interval_95[0] < 12.5 < pair.interval_95[1]
    assert pair.p == 2 * 2**-5 == pair.p_holm  # five images differ, all in one direction
    (pair,) = compare.compare(read_runs([str(f) for f in folders], tmp_path, "paper"), "paper").pairs
    assert (pair.difference, pair.interval_95, pair.p) == (0, (0, 0), 1)


def test_only_common_questions_are_compared(tmp_path: Path, write: Callable[..., Path]) -> None:
    write("a", lambda i, j: i < 6), write("b", lambda i, j: i < 3, num_images=8)
    (pair,) = compare.compare(read_runs(["a", "b"], tmp_path / "results", "official"), "official").pairs
    assert (pair.questions, pair.first_accuracy, pair.second_accuracy) == (48, 75, 37.5)


def test_few_runs_are_compared_in_pairs_many_with_the_first(tmp_path: Path, write: Callable[..., Path]) -> None:
    for k, name in enumerate("abcde"):
        write(name, lambda i, j, k=k: (i + j) % (k + 2) == 0)
    runs = read_runs(list("abcde"), tmp_path / "results", "official")
    few, many = compare.compare(runs[:4], "official").pairs, compare.compare(runs, "official").pairs
    assert [(p.first, p.second) for p in few] == [tuple(pair) for pair in ("ab", "ac", "ad", "bc", "bd", "cd")]
    assert [(p.first, p.second) for p in many] == [("a", name) for name in "bcde"]
    assert [p.p_holm for p in few] == holm([p.p for p in few])


def test_script_finds_models_by_name_and_writes(tmp_path: Path, write: Callable[..., Path], script: Any) -> None:
    for name in ("one", "other"):
        write("a", lambda i, j: i % 2 == 0, name=name)
        write("b", lambda i, j: True, name=name)
        for model in "ab":  # two benchmarks of different columns
            file = tmp_path / "results" / name / model / "results.json"
            file.write_text(file.read_text().replace("POPE", name))
    result = script("compare", "runs/a", "b", "--output", "out")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "out" / "compare.md").read_text()
    assert text.startswith(result.stdout) and result.stdout.startswith("# a and b\n")
    for name in ("one", "other"):
        assert f"| {name} | 50.00 (" in text
        assert f"| {name} | a | b | 60 | 50.00 | 100.00 | +50.00 |" in text  # p = 0.0625
    data = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert data["runs"] == ["a", "b"] and [pair["p_holm"] for pair in data["pairs"]] == [0.125, 0.125]
    with Image.open(tmp_path / "out" / "compare.png") as image:
        image.load()


def test_significant_differences_are_bold(tmp_path: Path, write: Callable[..., Path]) -> None:
    write("a", lambda i, j: False), write("b", lambda i, j: True)
    comparison = compare.compare(read_runs(["a", "b"], tmp_path / "results", "official"), "official")
    assert "**+100.00**" in compare.report(comparison) and comparison.pairs[0].p_holm == 2 * 2**-10


def test_what_cannot_be_compared_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    results = tmp_path / "results"
    first, other = write("a", lambda i, j: True), write("b", lambda i, j: True)

    def refused(message: str, *names: object, rule: str = "official") -> None:
        with pytest.raises(DataError, match=message):
            compare.compare(read_runs([str(name) for name in names], results, rule), rule)

    refused("two runs or more", first)
    refused("named twice", first, first)
    refused("nobody is no evaluation: .*cobra evaluate", first, "nobody")
    refused("no scores by the rule 'mine'; it has official, paper", first, other, rule="mine")
    lines = (other / "scores.jsonl").read_text()
    (other / "scores.jsonl").write_text(lines.replace('"0.png"', '"other.png"'))
    refused("question 0/0: a saw 0.png, b saw other.png", first, other)
    (other / "scores.jsonl").write_text(lines.replace('"image"', '"picture"'))
    refused("is not the scores of scripts/evaluate.py: a row has no 'image'", first, other)
    (other / "scores.jsonl").write_text("[1]")
    refused("is not the scores of scripts/evaluate.py", first, other)
    (other / "scores.jsonl").unlink()
    refused("has no scores.jsonl; the same evaluation again", first, other)
    (other / "scores.jsonl").write_text(lines)
    (other / "results.json").write_text((other / "results.json").read_text().replace("POPE", "VSR"))
    refused("no question in common: the first was evaluated on POPE, the second on VSR", first, other)
    (other / "results.json").unlink()
    (other / "predictions.jsonl").touch()
    refused("finish its evaluation", first, other)
    both = tmp_path / "both"
    for name in ("x", "y"):
        (both / name).mkdir(parents=True)
        for file in ("results.json", "scores.jsonl"):
            (both / name / file).write_text((first / file).read_text())
    refused("both has two evaluations of POPE", first, both)
