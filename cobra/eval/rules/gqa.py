"""GQA's numbers beyond accuracy, as eval.py of the data set defines them (cs.stanford.edu/people/dorarad/gqa)."""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UNCOUNTED_STEPS = ("exist", "query: name", "choose name")
_COMMON = ("color", "material", "shape")


def clean(answer: str) -> str:
    """Prepare a prediction as the paper's harness does: no ASCII punctuation, lower case; not stripped."""
    return answer.translate(_NO_PUNCTUATION).lower()


def num_steps(program: Sequence[dict[str, Any]]) -> int:
    """Count reasoning steps: operations, without those that only read out the answer."""
    texts = [f"{step['operation']}: {step['argument']}" for step in program]
    return sum(not any(part in text for part in _UNCOUNTED_STEPS) for text in texts)


def belongs(answer: str, group: Sequence[str], detailed_type: str) -> bool:
    """Tell whether an answer is among those that fit a question (`valid` or `plausible` of the choices file)."""
    return answer in (_COMMON if "Common" in detailed_type else group)


def distribution(rows: Iterable[tuple[str, str, str]]) -> float | None:
    """Return the chi-square distance of predicted from true answers over groups (lower is better).

    Args:
        rows: (group, true answer, predicted answer).
    """
    true: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for group, truth, answer in rows:
        true[group][truth] += 1
        predicted[group][answer] += 1
    total = weighted = 0.0
    for group, counts in true.items():
        size = counts.total()
        weighted += size * sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        total += size
    return weighted / total / 100 if total else None
