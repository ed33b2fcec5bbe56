"""Charts of scores."""

# pyright: basic
# matplotlib is only partly typed.

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cobra.eval.benchmark import MEAN, Scores
from cobra.runtime import write_atomically

_MANY = 12  # so many types are put in the order of their accuracy
_MEAN = "mean of the parts"
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One number with its confidence interval."""

    name: str
    percent: float
    interval: tuple[float, float] | None = None
    total: int = 0


def plot_breakdowns(folder: Path, scores: Scores, title: str) -> list[Path]:
    """Draw by_part.png, where there are several parts, and by_<breakdown>.png, by the main rule; return the files."""
    parts = next(iter(scores.parts.values()))
    files: list[Path] = []
    if len(parts) > 1:
        bars = [
            Bar(name=name if name != MEAN else _MEAN, percent=p.accuracy, interval=p.interval, total=p.num_questions)
            for name, p in parts.items()
        ]
        files.append(_plot_panels(folder / "by_part.png", {"": bars}, title))
    for breakdown in dict.fromkeys(name for part in parts.values() for name in part.by_type):
        panels = {
            name: [Bar(name=kind, percent=tally.percent, total=tally.total) for kind, tally in tallies.items()]
            for name, part in parts.items()
            if (tallies := part.by_type.get(breakdown))
        }
        file = folder / f"by_{re.sub(r'[^A-Za-z0-9]+', '_', breakdown)}.png"
        files.append(_plot_panels(file, panels, f"{title}, by {breakdown}"))
    return files


def _plot_panels(file: Path, panels: Mapping[str, Sequence[Bar]], title: str) -> Path:
    """Draw horizontal bars, one panel beside the other."""
    most = max(len(bars) for bars in panels.values())
    figure = Figure(figsize=(8 * len(panels), (0.5 if most <= _MANY else 0.27) * most + 1.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, (name, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        if len(bars) > _MANY:
            bars = sorted(bars, key=lambda bar: -bar.percent)
        places = range(len(bars))
        colors = ["tab:gray" if bar.name == _MEAN else "tab:blue" for bar in bars]
        axes.barh(places, [bar.percent for bar in bars], color=colors)
        _whiskers(axes, bars, places, horizontal=True)
        ends = [bar.interval[1] if bar.interval else bar.percent for bar in bars]
        for place, bar, end in zip(places, bars, ends, strict=True):
            axes.text(end + 1, place, f"{bar.percent:.1f} %  ({bar.total:,})", va="center")
        axes.set_yticks(places, [bar.name for bar in bars], parse_math=False)
        axes.set(xlim=(0, 125), ylim=(len(bars) - 0.4, -0.6), title=name)
        axes.set(xlabel="accuracy (%), in brackets the number of questions")
        axes.set_xticks(range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(file, partial(figure.savefig, dpi=120))
    return file


def _whiskers(axes: Axes, bars: Sequence[Bar], places: Sequence[float], *, horizontal: bool = False) -> None:
    """Draw the intervals over bars."""
    for place, bar in zip(places, bars, strict=True):
        if bar.interval:
            line: Any = axes.hlines if horizontal else axes.vlines
            line(place, *bar.interval, color="black", linewidth=1.2)


def plot_models(
    file: Path,
    models: Mapping[str, Sequence[Bar]],
    columns: Sequence[str],
    title: str,
    differences: Mapping[str, Sequence[Bar]] | None = None,
) -> None:
    """Draw several models side by side, one group of bars per column.

    Args:
        file: the picture.
        models: name -> bars, named after columns; columns that a model lacks stay empty.
        columns: in order.
        title: above all.
        differences: name -> differences from the first model, drawn in a panel below.
    """
    width = max(6.0, 2.5 + (0.55 + 0.38 * len(models)) * len(columns))
    panels = 1 + bool(differences)
    figure = Figure(figsize=(width, 4.6 if panels == 1 else 7.2), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, sharex=True, height_ratios=[3, 2][:panels])[:, 0]
    _draw_groups(axes[0], models, columns)
    if differences:
        _draw_differences(axes[1], differences, list(models), columns)
    axes[0].set_title(title, parse_math=False)
    legend = figure.legend(loc="outside lower center", ncols=max(1, int(width / 2)), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_atomically(file, partial(figure.savefig, dpi=120))


def _draw_groups(axes: Axes, groups: Mapping[str, Sequence[Bar]], columns: Sequence[str]) -> None:
    """Draw grouped bars with their values above them."""
    width = 0.8 / len(groups)
    for number, (name, bars) in enumerate(groups.items()):
        places = [columns.index(bar.name) + (number - (len(groups) - 1) / 2) * width for bar in bars]
        color = _COLORS[number % len(_COLORS)]
        axes.bar(places, [bar.percent for bar in bars], width * 0.92, color=color, label=name)
        _whiskers(axes, bars, places)
        for place, bar in zip(places, bars, strict=True):
            height = (bar.interval[1] if bar.interval else bar.percent) + 1
            axes.text(place, height, f"{bar.percent:.1f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    margin = max(0.6, 2 - len(columns) / 2)  # one group alone must not fill the picture
    axes.set(ylim=(0, 108), xlim=(-margin, len(columns) - 1 + margin), ylabel="accuracy (%)")
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_differences(
    axes: Axes, differences: Mapping[str, Sequence[Bar]], models: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw intervals around differences, in the models' colours."""
    width = 0.8 / len(models)
    for name, bars in differences.items():
        number = models.index(name)
        places = [columns.index(bar.name) + (number - (len(models) - 1) / 2) * width for bar in bars]
        color = _COLORS[number % len(_COLORS)]
        _whiskers(axes, bars, places)
        axes.plot(places, [bar.percent for bar in bars], "o", color=color, markeredgecolor="black")
    axes.axhline(0, color="tab:gray", linewidth=1)
    axes.set_ylabel(f"difference from {models[0]}", parse_math=False)
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def plot_differences(
    file: Path,
    panels: Mapping[str, Sequence[Bar]],
    references: Mapping[str, Sequence[Bar]],
    columns: Sequence[str],
    title: str,
) -> None:
    """Draw differences as dots with their intervals, the paper's below them; one panel per model.

    Args:
        file: the picture.
        panels: name -> differences, named after columns; columns that a model lacks stay empty.
        references: name -> the paper's differences.
        columns: from top to bottom.
        title: below all.
    """
    figure = Figure(figsize=(10, 0.36 * len(columns) + 1.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    ours: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "tab:blue", "markeredgecolor": "black"}
    theirs: dict[str, Any] = {**ours, "marker": "D", "color": "tab:orange", "markersize": 5}
    theirs |= {"markerfacecolor": "white", "markeredgecolor": "tab:orange"}
    for axes, (name, bars) in zip(all_axes, panels.items(), strict=True):
        axes.axvline(0, color="tab:gray", linewidth=1)
        places = [columns.index(bar.name) - 0.14 for bar in bars]
        _whiskers(axes, bars, places, horizontal=True)
        axes.plot([bar.percent for bar in bars], places, **ours)
        below = [columns.index(bar.name) + 0.2 for bar in references[name]]
        axes.plot([bar.percent for bar in references[name]], below, **theirs)
        axes.set_yticks(range(len(columns)), columns, parse_math=False)
        axes.set_ylim(len(columns) - 0.4, -0.6)
        axes.set_title(name if bars else f"{name} (missing)", fontsize=10, parse_math=False)
        for between in range(1, len(columns)):
            axes.axhline(between - 0.5, color="0.9", linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    marks = [Line2D([], [], label="ours", **ours), Line2D([], [], label="the paper's", **theirs)]
    figure.legend(handles=marks, loc="outside upper right", ncols=2, frameon=False)
    figure.supxlabel(title, fontsize=10)
    write_atomically(file, partial(figure.savefig, dpi=120))
