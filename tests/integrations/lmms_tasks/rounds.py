"""Two rounds: the document's question, then one that names the first answer."""

from __future__ import annotations

from typing import Any


def ask(
    doc: dict[str, Any],
    lmms_eval_specific_kwargs: dict[str, Any] | None = None,
    round_idx: int | None = None,
    previous_output: list[str] | None = None,
    previous_round_info: Any = None,
) -> Any:
    if round_idx is None:
        return doc["question"]
    question = f"is there a {previous_output[0]} shape?" if previous_output else ""
    return [doc["image"]], question, round_idx > 1, previous_output, {"round": round_idx}


def score(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    (rounds,) = results
    return {"right": float(rounds[0] == doc["answer"])}
