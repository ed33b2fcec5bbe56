"""Boxes `[x1, y1, x2, y2]` in 0..1: reading one from an answer, intersection over union."""

from __future__ import annotations

import ast
import warnings
from typing import Any, TypeAlias, cast

BoxXYXY: TypeAlias = tuple[float, float, float, float]

THRESHOLD = 0.5


def parse_box(answer: str) -> BoxXYXY | None:
    """Return the box that an answer spells as a Python list, or None when it is not a proper box.

    The paper's harness accepts any literal list of four numbers in 0..1 with x1 < x2 and y1 < y2, `0x1` and `True`
    included. Nothing is executed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks on odd literals
            values: Any = ast.literal_eval(answer)
        if not isinstance(values, list) or len(cast("list[Any]", values)) != 4:
            return None
        if not all(0 <= value <= 1 for value in cast("list[Any]", values)):
            return None
        x1, y1, x2, y2 = (float(value) for value in cast("list[Any]", values))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def normalise(box_xywh: tuple[float, float, float, float], width: int, height: int) -> BoxXYXY:
    """Turn COCO's pixels `x, y, width, height` into 0..1 corners."""
    x, y, w, h = box_xywh
    return (x / width, y / height, (x + w) / width, (y + h) / height)


def rounded(box: BoxXYXY) -> BoxXYXY:
    """Round to two decimals, as the paper's harness does to the true box; a thin one collapses."""
    x1, y1, x2, y2 = (round(value, 2) for value in box)
    return (x1, y1, x2, y2)


def iou(box: BoxXYXY, true: BoxXYXY) -> float:
    """Return intersection over union, with the harness's order of operations: some boxes sit exactly at 0.5."""
    left, top = max(box[0], true[0]), max(box[1], true[1])
    right, bottom = min(box[2], true[2]), min(box[3], true[3])
    area = (box[2] - box[0]) * (box[3] - box[1])
    true_area = (true[2] - true[0]) * (true[3] - true[1])
    intersection = max(0, right - left) * max(0, bottom - top)
    union = area + true_area - intersection
    return intersection / union if union else 0.0
