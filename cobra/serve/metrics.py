"""Counters of the server, as Prometheus reads them."""

from __future__ import annotations

from collections import Counter

_HELP = {
    "requests_total": "Requests for answers, by status.",
    "prompt_tokens_total": "Tokens read, images included.",
    "completion_tokens_total": "Tokens generated.",
    "images_total": "Images read.",
    "request_seconds_sum": "Time from request to last byte, all requests.",
    "request_seconds_count": "Requests in that time.",
    "first_token_seconds_sum": "Time from request to first text, streamed requests.",
    "first_token_seconds_count": "Requests in that time.",
    "open_answers": "Answers that are generated or wait for it.",
}


class Metrics:
    """Counts things by name and labels; use it in one thread."""

    def __init__(self) -> None:
        self._values: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, value: float = 1, labels: str = "") -> None:
        """Count up; `labels` as they are written, such as `{status="200"}`."""
        self._values[name, labels] += value  # type: ignore[assignment]

    def text(self, open_answers: int) -> str:
        """Return all values in Prometheus' text format, version 0.0.4."""
        lines: list[str] = []
        for name, text in _HELP.items():
            kind = "gauge" if name == "open_answers" else "counter"
            lines += [f"# HELP cobra_{name} {text}", f"# TYPE cobra_{name} {kind}"]
            found = {labels: value for (known, labels), value in sorted(self._values.items()) if known == name}
            if name == "open_answers":
                found = {"": open_answers}
            lines += [f"cobra_{name}{labels} {value:.15g}" for labels, value in (found or {"": 0}).items()]
        return "\n".join(lines) + "\n"
