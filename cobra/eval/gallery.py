"""examples.png: some answers of an evaluation at a glance."""

# pyright: basic
# matplotlib is only partly typed.

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cobra.eval.benchmark import Benchmark, Prediction, Question, Scores
from cobra.eval.rules.boxes import BoxXYXY, parse_box
from cobra.hub import open_image
from cobra.runtime import write_atomically

_POOL = 2_000  # right answers that examples are picked from: looking for other types takes time
_RIGHT, _WRONG = "#2a7f3f", "#b3261e"


def plot_examples(
    folder: Path,
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Mapping[str, Prediction],
    scores: Scores,
    title: str,
) -> None:
    """Draw examples.png: up to four wrong answers, then random right ones, each with question, prediction, truth.

    Boxes are drawn: the predicted one in the colour of its answer, the true one dashed in white.
    """
    chosen = choose_examples(questions, scores, num_wrong=4, num_all=12)
    columns = min(4, len(chosen))
    num_rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.9 * num_rows + 0.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(num_rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, question in zip(grid.flat, chosen, strict=False):
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        image = open_image(question.image).convert("RGB")
        axes.imshow(image)
        is_right = scores.main[question.id] >= 0.5
        color = _RIGHT if is_right else _WRONG
        prediction = predictions[question.id]
        truth = "" if is_right else _lines(f"truth: {benchmark.show_truth(question)}")
        axes.set_title(_lines(question.text.replace("<image>", "")), fontsize=10, parse_math=False)
        axes.set_xlabel(
            "\n".join(filter(None, (_lines(show(prediction)), truth))),
            fontsize=11, color=color, weight="bold", parse_math=False,
        )  # fmt: skip
        predicted = parse_box(prediction) if isinstance(prediction, str) else None
        true_box = benchmark.true_box(question)
        if true_box is not None:
            _draw_box(axes, true_box, image.size, color="white", linestyle="--")
            if predicted is not None:
                _draw_box(axes, predicted, image.size, color=color, linestyle="-")
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=2)
    write_atomically(folder / "examples.png", partial(figure.savefig, dpi=100))


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
