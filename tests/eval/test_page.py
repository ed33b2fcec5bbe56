"""examples.html: which examples, nothing from elsewhere, no text that becomes markup, boxes in their places."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import Made
from official import configured
from PIL import Image

from cobra.eval import page
from cobra.eval.benchmark import Benchmark, Prediction

ODD = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x00\x1b[31m\u2028\x85", "x" * 10_000, "\ud83d",
    "$title ${cards} \\1 </svg></article>", "&lt;b&gt;", "]]><!--", "",
]  # fmt: skip


class Read(HTMLParser):
    """Collects tags with their attributes, and the text of each article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.articles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.articles += [""] * (tag == "article")

    def handle_data(self, data: str) -> None:
        if self.articles and self.tags[-1][0] != "script":
            self.articles[-1] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder: Path, benchmark: Benchmark, answers: dict[str, Prediction], title: str = "title") -> Read:
    questions = [question for question in benchmark.questions() if question.id in answers]
    scores = benchmark.score(answers, questions)
    page.write_page(folder / "examples.html", benchmark, questions, answers, scores, title)
    return Read((folder / "examples.html").read_text(encoding="utf-8"))


def test_texts_never_become_markup(tmp_path: Path) -> None:
    benchmark = Made(tmp_path / "images", num_images=3)
    questions = benchmark.questions()
    plain = written(tmp_path, benchmark, {q.id: "x" for q in questions})
    answers: dict[str, Prediction] = {q.id: ODD[i % len(ODD)] for i, q in enumerate(questions)}
    odd = written(tmp_path, benchmark, answers, "<i>$title")
    assert [tag for tag, _ in odd.tags] == [tag for tag, _ in plain.tags]
    text = "".join(odd.articles)
    assert all(answer in text for answer in ODD[:2] + ODD[5:7]) and "(nothing)" in text
    assert "\x00" not in text and "\x1b" not in text and "x" * 1001 not in text
    assert (tmp_path / "examples.html").stat().st_size < 200_000


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    benchmark = Made(tmp_path / "images", num_images=3)
    read = written(tmp_path, benchmark, {q.id: q.truth for q in benchmark.questions()})
    addresses = [value for _, attributes in read.tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses and all(re.match(r"#i\d+$|data:image/jpeg;base64,", address) for address in addresses)
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "examples.html").read_text())
    assert not {"link", "iframe", "img"} & {tag for tag, _ in read.tags}
    assert len(read.all("script")) == 1


def test_image_stands_there_once_and_small(tmp_path: Path) -> None:
    benchmark = Made(tmp_path / "images", num_images=3)
    read = written(tmp_path, benchmark, {q.id: q.truth for q in benchmark.questions()})
    assert len(read.all("article")) == 18 and len(read.all("image")) == 3
    for image in read.all("image"):
        with Image.open(io.BytesIO(base64.b64decode(image["href"].partition(",")[2]))) as file:
            assert max(file.size) == page.IMAGE_SIDE and file.format == "JPEG"
            assert file.size == (int(image["width"]), int(image["height"]))
    used = [use["href"].removeprefix("#") for use in read.all("use")]
    assert sorted(set(used)) == [image["id"] for image in read.all("image")]


def test_boxes_are_drawn_in_place(tmp_path: Path) -> None:
    benchmark = Made(tmp_path / "images", num_images=1)
    read = written(tmp_path, benchmark, {"0/0": "[0.0, 0.1, 0.5, 0.6]", "0/1": "[0.5, 0.1, 0.4, 0.6]"})
    (view, other) = (svg["viewbox"] for svg in read.all("svg") if "viewbox" in svg)
    assert view == other == "0 0 480 240"
    boxes = [(box["class"], *(float(box[key]) for key in ("x", "y", "width", "height"))) for box in read.all("rect")]
    true, predicted = (120, 120, 240, 120), (0, 24, 240, 120)
    assert [box[1:] for box in boxes if box[0] == "true"] == [true, true]
    assert [box[1:] for box in boxes if box[0] == "predicted"] == [predicted]  # the other one is no box
    assert len(boxes) == 6  # each over its rim


def test_examples_are_the_best_the_worst_and_some_others(tmp_path: Path) -> None:
    benchmark = Made(tmp_path / "images", num_images=60)
    questions = benchmark.questions()
    answers: dict[str, Prediction] = {q.id: q.truth if i % 2 else "no" for i, q in enumerate(questions)}
    scores = benchmark.score(answers, questions)
    chosen = page.choose(questions, answers, scores)
    for name, count in page.SETS.items():
        assert sum(name in sets for sets in chosen.values()) == count
    assert {scores.main[one] for one, sets in chosen.items() if "best" in sets} == {1}
    assert {scores.main[one] for one, sets in chosen.items() if "worst" in sets} == {0}
    assert page.choose(questions, answers, scores) == chosen
    read = written(tmp_path, benchmark, answers)
    data = [{key: json.loads(value) for key, value in one.items() if key != "class"} for one in read.all("article")]
    assert len(data) == len(chosen) <= 200
    assert [tuple(one["data-sets"]) for one in data] == list(chosen.values())
    assert [one["data-verdict"] == ["right"] for one in data] == [scores.main[one] == 1 for one in chosen]
    options = [option.get("value") for option in read.all("option")]
    assert {kind for one in data for kind in one["data-types"]} <= set(options) and {"a", "b"} <= set(options)


def test_filters_know_very_long_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = Made(tmp_path / "images", num_images=1)
    long = [
        replace(q, types={"kind": f'{i} "quoted" é\x00' + "long " * 400}) for i, q in enumerate(benchmark.questions())
    ]
    monkeypatch.setattr(Made, "questions", lambda _: long)
    read = written(tmp_path, benchmark, {q.id: q.truth for q in long})
    kinds = {json.loads(one["data-types"])[0] for one in read.all("article")}
    options = {option.get("value") for option in read.all("option")}
    assert len(kinds) == 6 and kinds <= options and max(map(len, kinds)) < 1100


def test_surest_answers_come_first(assets: Path, tmp_path: Path) -> None:
    benchmark = configured("vsr", assets / "fixtures" / "scorers" / "data_root")
    questions = benchmark.questions()
    yes = np.random.default_rng(0).random(len(questions)).tolist()
    answers = {q.id: {"True": p, "False": 1 - p} for q, p in zip(questions, yes, strict=True)}
    scores = benchmark.score(answers, questions)
    chosen = page.choose(questions, answers, scores)
    for name, score in (("best", 1), ("worst", 0)):
        sure = {one: max(row.values()) for one, row in answers.items() if scores.main[one] == score}
        found = {one for one, sets in chosen.items() if name in sets}
        assert min(sure[one] for one in found) >= max(value for one, value in sure.items() if one not in found)
    read = written(tmp_path, benchmark, answers)
    assert len(read.all("meter")) == 2 * len(read.all("article"))


def test_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = Made(tmp_path / "images", num_images=20)
    rng = np.random.default_rng(0)
    for question in benchmark.questions()[::6]:
        Image.fromarray(rng.integers(0, 256, (480, 480, 3), dtype=np.uint8)).save(question.image)
    monkeypatch.setattr(page, "MAX_BYTES", 400_000)
    read = written(tmp_path, benchmark, {q.id: q.truth for q in benchmark.questions()})
    assert 0 < len(read.all("image")) < 10 and (tmp_path / "examples.html").stat().st_size < 500_000
    assert {use["href"] for use in read.all("use")} == {f"#{image['id']}" for image in read.all("image")}
    assert f"{len(read.all('article'))} of 120 answers" in (tmp_path / "examples.html").read_text()
