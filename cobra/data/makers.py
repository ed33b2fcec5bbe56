"""Data sets that Cobra makes by itself, by the name that `data.source` gives."""

from __future__ import annotations

from pathlib import Path

from cobra.data import easyvqa, toy

_MAKERS = {"easyvqa": easyvqa.prepare, "toy": toy.prepare}


def make_if_missing(source: str | None, annotations: Path) -> None:
    """Make the data set around its annotation file, `train.json`, unless the file is there. Does nothing for None."""
    if source is not None and annotations.name == "train.json" and not annotations.exists():
        _MAKERS[source](annotations.parent)
