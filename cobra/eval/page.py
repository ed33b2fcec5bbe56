"""examples.html: up to 200 answers in one file, with images, boxes and filters; needs nothing from anywhere.

An image stands in the file once, however many questions are about it. Without JavaScript all examples are shown.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from string import Template

import numpy as np

from cobra.eval.benchmark import Benchmark, Prediction, Question, Scores
from cobra.eval.gallery import printable
from cobra.eval.rules.boxes import BoxXYXY, parse_box
from cobra.hub import open_image
from cobra.runtime import write_text

SETS = {"best": 60, "worst": 60, "random": 80}  # how many examples of each
IMAGE_SIDE = 480  # pixels
MAX_BYTES = 7_500_000  # of all images; those that come last are left out
_MAX_TEXT = 1_000  # characters of an answer that are shown
_TEMPLATE = "assets/pages/examples.html"


@dataclass(frozen=True)
class _Image:
    number: int
    width: int
    height: int
    data_url: str


def write_page(
    file: Path,
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Mapping[str, Prediction],
    scores: Scores,
    title: str,
) -> None:
    """Write the page; `questions` are those that were answered."""
    sets = choose(questions, answers, scores)
    by_id = {question.id: question for question in questions}
    images: dict[Path, _Image] = {}
    cards: list[str] = []
    left = MAX_BYTES
    for name, kinds in sets.items():
        question = by_id[name]
        if question.image not in images:
            image = _read(question.image, len(images))
            if len(image.data_url) > left:
                continue
            left -= len(image.data_url)
            images[question.image] = image
        cards.append(_card(benchmark, question, answers[name], scores, images[question.image], kinds))
    template = Template((files("cobra") / _TEMPLATE).read_text(encoding="utf-8"))
    about = (
        f"{len(cards)} of {len(questions):,} answers: the best, the worst, and some at random. "
        "Right is a score of 0.5 or more."
    )
    shown = [by_id[name] for name in sets]
    about += " The true boxes are dashed." * any(benchmark.true_box(question) for question in shown)
    text = template.substitute(
        title=_text(title),
        about=_text(about),
        selects="\n".join(_selects(shown)),
        images="\n".join(_symbol(image) for image in images.values()),
        cards="\n".join(cards),
    )
    write_text(file, text)


def choose(
    questions: Sequence[Question], answers: Mapping[str, Prediction], scores: Scores
) -> dict[str, tuple[str, ...]]:
    """Return ids with the sets they are in, the sets in turns, so that what is cut off at the end is cut off of all.

    The best are right answers, the worst are wrong ones; of equal scores those that the model was surest of, where it
    gave probabilities, else some at random. Always the same ones.
    """
    numbers: list[int] = np.random.default_rng(0).permutation(len(questions)).tolist()
    order = [questions[i] for i in numbers]
    surest = sorted(order, key=lambda question: -_sureness(answers[question.id]))
    best = sorted((q for q in surest if scores.main[q.id] >= 0.5), key=lambda q: -scores.main[q.id])
    worst = sorted((q for q in surest if scores.main[q.id] < 0.5), key=lambda q: scores.main[q.id])
    sets: dict[str, list[str]] = {
        name: [question.id for question in chosen[: SETS[name]]]
        for name, chosen in (("best", best), ("worst", worst), ("random", order))
    }
    turns = chain.from_iterable(zip_longest(*sets.values()))
    members = {name: set(chosen) for name, chosen in sets.items()}
    return {
        one: tuple(name for name, chosen in members.items() if one in chosen)
        for one in dict.fromkeys(turns)
        if one is not None
    }


def _sureness(prediction: Prediction) -> float:
    return 0.0 if isinstance(prediction, str) else max(prediction.values()) / sum(prediction.values())


def _read(path: Path, number: int) -> _Image:
    """Shrink an image and turn it into a data URL."""
    image = open_image(path).convert("RGB")
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72, optimize=True)
    return _Image(number, *image.size, f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}")


def _symbol(image: _Image) -> str:
    size = f'width="{image.width}" height="{image.height}"'
    return f'<image id="i{image.number}" {size} href="{image.data_url}"/>'


def _card(
    benchmark: Benchmark,
    question: Question,
    prediction: Prediction,
    scores: Scores,
    image: _Image,
    sets: Sequence[str],
) -> str:
    verdict = "right" if scores.main[question.id] >= 0.5 else "wrong"
    data = {
        "sets": sets,
        "verdict": [verdict],
        "part": [question.part],
        "types": [f"{name}: {kind}" for name, kind in question.types.items()],
    }
    # Cut before they become JSON, as the options of the filters are: half a list would be none.
    attributes = " ".join(f'data-{name}="{escape(json.dumps([_cut(v) for v in vs]))}"' for name, vs in data.items())
    rules = ", ".join(f"{rule} {values[question.id]:.4g}" for rule, values in scores.per_question.items())
    rows = [("answer", _said(prediction)), ("truth", _text(benchmark.show_truth(question))), ("score", _text(rules))]
    tags = " · ".join(filter(None, (*sets, question.id, question.part, *data["types"])))
    return (
        f'<article class="{verdict}" {attributes}>\n'
        f'<svg viewBox="0 0 {image.width} {image.height}"><use href="#i{image.number}"/>'
        f"{_boxes(benchmark.true_box(question), prediction, image)}</svg>\n"
        f'<div class="text"><div class="question">{_text(question.text.replace("<image>", "").strip())}</div>\n'
        f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in rows)}</dl>\n"
        f'<div class="tags">{_text(tags)}</div></div>\n</article>'
    )


def _said(prediction: Prediction) -> str:
    if isinstance(prediction, str):
        return f'<span class="said">{_text(prediction or "(nothing)")}</span>'
    total, likeliest = sum(prediction.values()), max(prediction, key=lambda word: prediction[word])
    return "\n".join(
        f"<span{' class=said' * (word == likeliest)}>{_text(word)} {100 * value / total:.1f} %</span> "
        f'<meter value="{value / total:.4f}"></meter>'
        for word, value in prediction.items()
    )


def _boxes(true: BoxXYXY | None, prediction: Prediction, image: _Image) -> str:
    """Draw boxes as in examples.png, each over a dark rim that tells it from any image."""
    if true is None:
        return ""
    predicted = parse_box(prediction) if isinstance(prediction, str) else None
    kinds = (("true", true), ("predicted", predicted))
    return "".join(_rectangle(box, kind, image) for kind, box in kinds if box is not None)


def _rectangle(box: BoxXYXY, kind: str, image: _Image) -> str:
    x1, y1, x2, y2 = box
    place = f'x="{x1 * image.width:.1f}" y="{y1 * image.height:.1f}"'
    size = f'width="{(x2 - x1) * image.width:.1f}" height="{(y2 - y1) * image.height:.1f}"'
    return f'<rect class="rim" {place} {size}/><rect class="{kind}" {place} {size}/>'


def _selects(questions: Sequence[Question]) -> Iterable[str]:
    """Yield the filters for parts and types, where there is something to choose from."""
    parts = dict.fromkeys(question.part for question in questions)
    kinds = sorted({f"{name}: {kind}" for question in questions for name, kind in question.types.items()})
    for name, label, values in (("part", "part", list(parts)), ("types", "type", kinds)):
        if len(values) > 1:
            options = "".join(f'<option value="{_text(value)}">{_text(value)}' for value in values)
            yield f'<label>{label} <select name="{name}"><option value="">all{options}</select></label>'


def _text(text: str) -> str:
    """Return a text of unknown content for HTML, cut where it is very long."""
    return escape(_cut(text))


def _cut(text: str) -> str:
    return printable(text[:_MAX_TEXT] + " ..." * (len(text) > _MAX_TEXT))
