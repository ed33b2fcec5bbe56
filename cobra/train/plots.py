"""loss.png: what training looked like."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from cobra.runtime import write_atomically
from cobra.train.trackers import METRICS_FILE, read_metrics


def plot_loss(run_folder: Path) -> None:
    """Draw loss, learning rate and gradient norm against steps from metrics.jsonl into loss.png."""
    rows = read_metrics(run_folder / METRICS_FILE)
    if not rows:
        return
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    top.plot(steps, [row["loss"] for row in rows], color="tab:blue")
    top.set(ylabel="loss per labelled token", yscale="log", title=run_folder.name)
    middle.plot(steps, [row["grad_norm"] for row in rows], color="tab:orange")
    middle.set(ylabel="gradient norm", yscale="log")
    bottom.plot(steps, [row["lr"] for row in rows], color="tab:green")
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    write_atomically(run_folder / "loss.png", partial(figure.savefig, dpi=120))
