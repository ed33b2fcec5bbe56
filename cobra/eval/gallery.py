"""examples.png: some answers of an evaluation at a glance."""

# pyright: basic
# matplotlib is only partly typed.

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cobra.eval.benchmark import MEAN, Benchmark, Prediction, Question, Scores
from cobra.eval.rules.boxes import BoxXYXY, parse_box
from cobra.hub import open_image
from cobra.runtime import write_atomically

_POOL = 2_000  # right answers that examples are picked from: looking for other types takes time
_RIGHT, _WRONG = "#2a7f3f", "#b3261e"
_IMAGE, _HEAD, _FOOT, _GAP, _TITLE = 2.9, 0.17, 0.2, 0.2, 0.4  # inches: an image, lines of text, space, the title


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question, what was answered, and whether that is right."""

    benchmark: Benchmark
    question: Question
    prediction: Prediction
    is_right: bool
    label: str = ""  # above the question

    @property
    def head(self) -> str:
        """The label and the question, in lines."""
        return "\n".join(filter(None, (self.label, _lines(self.question.text.replace("<image>", "")))))

    @property
    def foot(self) -> str:
        """The answer, and the truth where that is another, in lines."""
        truth = "" if self.is_right else _lines(f"truth: {self.benchmark.show_truth(self.question)}")
        return "\n".join(filter(None, (_lines(show(self.prediction)), truth)))


def examples(
    benchmark: Benchmark, chosen: Sequence[Question], predictions: Mapping[str, Prediction], scores: Scores
) -> list[Example]:
    """Return the chosen questions with their answers."""
    return [
        Example(
            benchmark=benchmark,
            question=question,
            prediction=predictions[question.id],
            is_right=scores.main[question.id] >= 0.5,
        )
        for question in chosen
    ]


def one_of_each_column(
    benchmark: Benchmark, questions: Sequence[Question], predictions: Mapping[str, Prediction], scores: Scores
) -> list[Example]:
    """Draw one question of each column, always the same one, whether its answer is right or wrong."""
    asked = [questions[i] for i in np.random.default_rng(0).permutation(len(questions)).tolist()]
    asked = [question for question in asked if question.id in scores.main]  # what could not be asked has no score
    shown: list[Example] = []
    for column, part in scores.columns.items():
        first = next((question for question in asked if part in (question.part, MEAN)), None)
        chosen = examples(benchmark, [first] if first else [], predictions, scores)
        shown += [replace(example, label=column) for example in chosen]
    return shown


def plot_examples(file: Path, shown: Sequence[Example], title: str, num_columns: int = 4) -> None:
    """Draw each example's image, with the question above and the answer, and the truth if it is another, below.

    Boxes are drawn: the predicted one in the colour of its answer, the true one dashed in white.
    """
    figure = _figure(shown, title, num_columns)
    write_atomically(file, partial(figure.savefig, dpi=100))


def _figure(shown: Sequence[Example], title: str, num_columns: int) -> Figure:
    num_columns = min(num_columns, len(shown))
    rows = [shown[start : start + num_columns] for start in range(0, len(shown), num_columns)]
    # In inches. No automatic layout: it lets long questions run into the row above.
    above = [_HEAD * max(example.head.count("\n") + 1 for example in row) + _GAP for row in rows]
    below = [_FOOT * max(example.foot.count("\n") + 1 for example in row) + _GAP for row in rows]
    width, height = num_columns * (_IMAGE + _GAP) + _GAP, len(rows) * _IMAGE + sum(above) + sum(below) + _TITLE
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, y=1 - _TITLE / 2 / height, va="center")
    top = height - _TITLE
    for row, head, foot in zip(rows, above, below, strict=True):
        bottom = top - head - _IMAGE
        for i, example in enumerate(row):
            left = _GAP + i * (_IMAGE + _GAP)
            axes = figure.add_axes((left / width, bottom / height, _IMAGE / width, _IMAGE / height))
            _draw(axes, example)
        top = bottom - foot
    return figure


def _draw(axes: Any, example: Example) -> None:
    image = open_image(example.question.image).convert("RGB")
    color = _RIGHT if example.is_right else _WRONG
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.set_title(example.head, fontsize=10, parse_math=False)
    axes.set_xlabel(example.foot, fontsize=11, color=color, weight="bold", parse_math=False)
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2)
    true_box = example.benchmark.true_box(example.question)
    if true_box is not None:
        predicted = parse_box(example.prediction) if isinstance(example.prediction, str) else None
        _draw_box(axes, true_box, image.size, color="white", linestyle="--")
        if predicted is not None:
            _draw_box(axes, predicted, image.size, color=color, linestyle="-")


def show(prediction: Prediction) -> str:
    """Return a prediction for people to read: of probabilities, the likeliest word."""
    if isinstance(prediction, str):
        return prediction or "(nothing)"
    word = max(prediction, key=lambda word: prediction[word])  # of equal ones the first, as the rules take it
    return f"{word} ({100 * prediction[word] / sum(prediction.values()):.0f} %)"


def printable(text: str) -> str:
    """Return a text without control characters and halves of characters."""
    return "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _lines(text: str) -> str:
    """Wrap a text to a picture's width and cut it to its height."""
    return textwrap.fill(printable(text).strip(), 34, max_lines=5, placeholder=" ...")


def _draw_box(axes: Any, box: BoxXYXY, size: tuple[int, int], *, color: str, linestyle: str) -> None:
    """Draw a box given in 0..1; a dark rim tells it from any image."""
    (x1, y1, x2, y2), (width, height) = box, size
    corner, extent = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
    for rim, width, style in (("black", 3.5, "-"), (color, 2.0, linestyle)):
        axes.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=rim, linewidth=width, linestyle=style))


def choose_examples(questions: Sequence[Question], scores: Scores, *, num_wrong: int, num_all: int) -> list[Question]:
    """Pick wrong answers first, then right ones of as many images and types as there are; always the same ones."""
    order = [questions[i] for i in np.random.default_rng(0).permutation(len(questions)).tolist()]
    chosen = [question for question in order if scores.main[question.id] < 0.5][:num_wrong]
    right = [question for question in order if scores.main[question.id] >= 0.5][:_POOL]
    while right and len(chosen) < num_all:
        counts = Counter(question.type for question in chosen)
        seen = {question.image for question in chosen}
        best = min(right, key=lambda q: (q.image in seen, counts[q.type]))
        chosen.append(best)
        right.remove(best)
    return chosen
