"""What the paper reports, to compare with: arXiv 2403.14520v4, tables 2 to 5, in percent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from cobra.eval.benchmark import Benchmark
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

ABLATED = {"RefCOCOg": 48.9}  # of the full model, where Table 5 differs from Table 4

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

_SHORT = "\nAnswer the question using a single word or phrase."
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

_BY_PART = "prompts"  # of TextVQA

# How its harness asks: settings of the benchmark that has this first column.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "VQA-v2": {"prompt": "{question}" + _SHORT},
    "GQA": {"prompt": "{question}" + _SHORT, "tier": "testdev_balanced"},
    "VizWiz": {"prompt": "{question}" + _UNANSWERABLE + _SHORT},
    "TextVQA": {
        "prompts": {
            "ocr_first": "Reference OCR token: {ocr}\n{question}" + _SHORT,
            "ocr_last": "{question}\nReference OCR token: {ocr}" + _SHORT,
            "no_ocr": "{question}" + _SHORT,
        }
    },
    "VSR": {
        "prompt": 'Based on the image, is this statement "True" or "False"? {question}\n'
        'Respond with "True" or "False" directly.',
        "split": "test",
    },
    "POPE": {"prompt": "{question}" + _SHORT, "ask": "choices"},
    "RefCOCO": {
        "prompt": 'Please provide the bounding box coordinate of the region this sentence describes: "{question}"'
    },
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
    """Return which of `ROWS` a model is compared with: its own, where its folder has such a name.

    A run's checkpoint is none of the released models, and neither is what lies in a folder of such a name.
    """
    name = PurePath(model).name.replace("+", "-")  # the Hub has `cobra+3b`
    return name if name in ROWS else default


def comparable(
    row: str, column: str | None, part: str, num_questions: int, *, is_fair: bool
) -> tuple[float | None, bool]:
    """Return the paper's number to hold against a part, if it has one, and whether both are of the same questions.

    Args:
        row: of `ROWS`.
        column: of the paper's table, where the part stands in one.
        part: of a benchmark; the paper has other prompt orders of TextVQA beside its table.
        num_questions: of the part.
        is_fair: what `asked_as_in_paper` says.
    """
    orders = ROWS[row].prompt_orders
    value = ROWS[row].scores.get(column or "", orders.get(part))
    return value, is_fair and num_questions in _QUESTIONS.get("TextVQA" if part in orders else column or "", ())


def asked_as_in_paper(facts: Mapping[str, Any], benchmark: Benchmark, part: str) -> bool:
    """Tell whether nothing was left out and nothing was asked in another way than the paper's harness asks it.

    Args:
        facts: of the evaluation, as results.json holds them.
        benchmark: what was asked.
        part: of the benchmark.
    """
    if any(facts.get(key) for key in ("limit", "subset", "missing_images", "broken_images")):
        return False
    column = next(iter(benchmark.columns), "")
    for setting, wanted in _SETTINGS.get(column, {}).items():
        found: Any = getattr(benchmark, setting, None)
        if (found[part] != wanted[part]) if setting == _BY_PART else (found != wanted):
            return False
    return True
