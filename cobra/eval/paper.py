"""What the paper reports, to compare with: arXiv 2403.14520v4, tables 2 to 5, in percent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from cobra.releases import COLUMNS, RELEASES

SOURCE = "arXiv 2403.14520v4"
DEFAULT = "cobra-3b"

_LABELS = {
    "cobra-3b": "Cobra-3.5B",
    "cobra-8b": "Cobra-8B",
    "cobra-3b-siglip": "w/ SigLIP only",
    "cobra-3b-ldpv2": "w/ LDPv2",
    "cobra-3b-base": "w/ base LLM",
    "cobra-3b-one-epoch": "w/ 1 epoch",
    "cobra-3b-aligned": "w/ PT+FT",
}

_PROMPT_ORDERS = {  # of TextVQA
    "cobra-3b": {"ocr_first": 58.2, "ocr_last": 43.0, "no_ocr": 47.9},
    "cobra-8b": {"ocr_first": 59.5, "ocr_last": 43.0, "no_ocr": 50.7},
}

NOTES = {("cobra-3b", "RefCOCOg"): "RefCOCOg: 46.9 is in the paper's Table 4; its Table 5 has 48.9."}

# How many questions each number of the paper is of. POPE's random split has grown by 90 since.
_QUESTIONS = {
    "VQA-v2": (214_354,),
    "GQA": (12_578,),
    "VizWiz": (4_319,),
    "TextVQA": (5_000,),
    "VSR": (1_222,),
    "POPE": (8_910, 9_000),
    "RefCOCO": (10_834,),
    "RefCOCO+": (10_758,),
    "RefCOCOg": (4_896,),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the paper's table."""

    label: str
    scores: Mapping[str, float]  # by column
    prompt_orders: Mapping[str, float] = field(default_factory=dict[str, float])


ROWS = {
    name: Row(
        label=label,
        scores=dict(zip(COLUMNS, RELEASES[name].scores, strict=True)),
        prompt_orders=_PROMPT_ORDERS.get(name, {}),
    )
    for name, label in _LABELS.items()
}

LLAVA = Row(
    label="LLaVA-1.5-7B",
    scores=dict(zip(COLUMNS, (78.5, 62.0, 50.0, 58.2, 51.5, 85.9, 55.1, 49.5, 50.9), strict=True)),
)


def row_name(model: str, default: str = DEFAULT) -> str:
    """Return which of `ROWS` a model is compared with: its own, where a folder of its path has such a name."""
    folders = [folder.replace("+", "-") for folder in reversed(PurePath(model).parts)]  # the Hub has `cobra+3b`
    return next((folder for folder in folders if folder in ROWS), default)


def comparable(row: str, column: str | None, part: str, num_questions: int) -> tuple[float | None, bool]:
    """Return the paper's number to hold against a part, if it has one, and whether it is of as many questions.

    Args:
        row: of `ROWS`.
        column: of the paper's table, where the part stands in one.
        part: of a benchmark; the paper has other prompt orders of TextVQA beside its table.
        num_questions: of the part.
    """
    orders = ROWS[row].prompt_orders
    value = ROWS[row].scores.get(column or "", orders.get(part))
    return value, num_questions in _QUESTIONS.get("TextVQA" if part in orders else column or "", ())
