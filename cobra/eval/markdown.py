"""Numbers and tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOTHING = "—"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, num_names: int = 1) -> list[str]:
    """Return the lines of a table and an empty one; the first `num_names` columns are text, the others numbers."""
    marks = ["---"] * num_names + ["---:"] * (len(head) - num_names)
    return [_row(head), "|" + "|".join(marks) + "|", *map(_row, rows), ""]


def percent(value: float | None) -> str:
    """Return a number with two decimals, or a dash."""
    return NOTHING if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    """Return a difference with its sign, or a dash."""
    return NOTHING if value is None else f"{value:+.2f}"


def span(interval: Sequence[float]) -> str:
    """Return a confidence interval."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def plain(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return "".join(f"\\{c}" if c in "\\`*_<>[]|#$~" else c for c in kept)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
