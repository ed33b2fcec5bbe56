"""Pictures of an evaluation: a bar chart per question type, and a page of examples."""

# pyright: basic
# matplotlib is only partly typed.

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cobra.eval.benchmark import Question, Scores
from cobra.hub import open_image
from cobra.runtime import write_atomically

_RIGHT, _WRONG = "#2a7f3f", "#b3261e"


def plot_types(folder: Path, scores: Scores, title: str) -> None:
    """Draw by_type.png: accuracy of each question type, with the number of questions."""
    names = [*scores.by_type, "all"]
    tallies = [*scores.by_type.values(), scores.overall]
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    colors = ["tab:blue"] * len(scores.by_type) + ["tab:gray"]
    bars = axes.barh(names, [tally.percent for tally in tallies], color=colors)
    labels = [f"{tally.percent:.1f} %  ({tally.total:,})" for tally in tallies]
    axes.bar_label(bars, labels=labels, padding=4)
    axes.set(xlim=(0, 122), xlabel="accuracy (%), in brackets the number of questions", title=title)
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(folder / "by_type.png", partial(figure.savefig, dpi=120))


def plot_examples(
    folder: Path, questions: Sequence[Question], predictions: Mapping[str, str], scores: Scores, title: str
) -> None:
    """Draw examples.png: up to four wrong answers, then random right ones, each with question, prediction, truth."""
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
        axes.imshow(open_image(question.image).convert("RGB"))
        is_right = scores.main[question.id] >= 0.5
        text = textwrap.fill(question.text.replace("<image>", "").strip(), 34)
        answer = f"{predictions[question.id] or '(nothing)'}" + ("" if is_right else f"   (truth: {question.truth})")
        axes.set_title(text, fontsize=10)
        axes.set_xlabel(textwrap.fill(answer, 34), fontsize=11, color=_RIGHT if is_right else _WRONG, weight="bold")
        for spine in axes.spines.values():
            spine.set(color=_RIGHT if is_right else _WRONG, linewidth=2)
    write_atomically(folder / "examples.png", partial(figure.savefig, dpi=100))


def choose_examples(questions: Sequence[Question], scores: Scores, *, num_wrong: int, num_all: int) -> list[Question]:
    """Pick wrong answers first, then right ones of as many images and types as there are; always the same ones."""
    order = [questions[i] for i in np.random.default_rng(0).permutation(len(questions)).tolist()]
    chosen = [question for question in order if scores.main[question.id] < 0.5][:num_wrong]
    right = [question for question in order if scores.main[question.id] >= 0.5]
    while right and len(chosen) < num_all:
        counts = {q.type: sum(c.type == q.type for c in chosen) for q in right}
        seen = {question.image for question in chosen}
        best = min(right, key=lambda q: (q.image in seen, counts[q.type]))
        chosen.append(best)
        right.remove(best)
    return chosen
