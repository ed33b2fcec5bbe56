"""loss.png and throughput.png: what training looked like, from metrics.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cobra.runtime import write_atomically
from cobra.train.trackers import METRICS_FILE, read_metrics

Row = dict[str, Any]


def plot_run(run_folder: Path) -> None:
    """Draw the run's pictures; nothing before its first metrics."""
    rows = read_metrics(run_folder / METRICS_FILE) if (run_folder / METRICS_FILE).exists() else []
    steps = [row for row in rows if "examples_per_second" in row]
    if steps:
        plot_loss(run_folder, steps, [row for row in rows if "examples_per_second" not in row])
        plot_throughput(run_folder, steps)


def plot_loss(run_folder: Path, rows: Sequence[Row], validations: Sequence[Row]) -> None:
    """Loss, gradient norm, learning rate and what validation found, against steps."""
    panels = 3 + bool(validations)
    figure, axes = _panels(panels, run_folder.name)
    _curve(axes[0], rows, "loss", "loss per labelled token", "tab:blue", log=True)
    _curve(axes[1], rows, "grad_norm", "gradient norm", "tab:orange", log=True)
    _curve(axes[2], rows, "lr", "learning rate", "tab:green")
    for name in sorted({key for row in validations for key in row} - {"step"}):
        found = [row for row in validations if name in row]
        axes[3].plot([row["step"] for row in found], [row[name] for row in found], marker="o", label=name)
    if validations:
        axes[3].set(ylabel="percent")
        axes[3].legend(loc="lower right")
    _save(figure, run_folder / "loss.png")


def plot_throughput(run_folder: Path, rows: Sequence[Row]) -> None:
    """Tokens and examples per second, where the time and the positions are lost, and memory, against steps."""
    figure, axes = _panels(3, run_folder.name)
    _curve(axes[0], rows, "tokens_per_second", "tokens/s", "tab:blue")
    beside = axes[0].twinx()
    _curve(beside, rows, "examples_per_second", "examples/s", "tab:cyan")
    for panel, color in ((axes[0], "tab:blue"), (beside, "tab:cyan")):
        panel.yaxis.label.set_color(color)
    for name, color in (("data_wait_fraction", "tab:red"), ("padding_fraction", "tab:orange"), ("mfu", "tab:green")):
        if any(row.get(name) is not None for row in rows):
            _curve(axes[1], rows, name, "share", color, label=name.replace("_", " ").replace("mfu", "MFU"))
    axes[1].set(ylim=(0, 1))
    axes[1].legend(loc="upper right")
    _curve(axes[2], rows, "memory_gib", "peak memory, GiB", "tab:purple")
    _save(figure, run_folder / "throughput.png")


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8, 2 + 1.6 * count), layout="constrained")
    axes = list(figure.subplots(count, 1, sharex=True, height_ratios=[2] + [1] * (count - 1)))
    axes[0].set(title=title)
    axes[-1].set(xlabel="step")
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes


def _curve(
    axes: Axes, rows: Sequence[Row], key: str, name: str, color: str, *, log: bool = False, label: str | None = None
) -> None:
    found = [row for row in rows if row.get(key) is not None]
    values = [row[key] for row in found]
    axes.plot([row["step"] for row in found], values, color=color, label=label)
    axes.set(ylabel=name)
    if log:
        axes.set(yscale="log")
    else:
        axes.set(ylim=(0, 1.1 * max(values, default=0) or 1))  # a level curve must not lie on the frame


def _save(figure: Figure, file: Path) -> None:
    write_atomically(file, partial(figure.savefig, dpi=120))
