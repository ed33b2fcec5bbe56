"""What is wrong with a data set: counts and first examples of each kind of problem, one error or one warning."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

_SHOWN = 3  # examples of each kind in an error's message


@dataclass
class Report:
    """Problems of rows by kind. `empty_answers` are none: they become one space, and are counted all the same."""

    kept: ClassVar = 20  # examples of each kind

    counts: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, list[str]] = field(default_factory=dict[str, "list[str]"])
    empty_answers: int = 0

    def add(self, kind: str, example: str) -> None:
        """Count a problem, and remember it if it is among the first of its kind."""
        self.add_all(kind, [example], 1)

    def add_all(self, kind: str, examples: Iterable[str], count: int) -> None:
        """Count `count` problems of a kind, with examples of the first ones."""
        if count:
            self.counts[kind] += count
            shown = self.first.setdefault(kind, [])
            shown += islice(examples, self.kept - len(shown))

    def __str__(self) -> str:
        parts = []
        for kind, count in self.counts.items():
            shown = "; ".join(self.first[kind][:_SHOWN])
            parts.append(f"{count:,} x {kind} ({shown}{'; ...' if count > _SHOWN else ''})")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        problems = {kind: {"count": count, "first": self.first[kind]} for kind, count in self.counts.items()}
        return {"problems": problems, "empty_answers": self.empty_answers}

    def as_json(self) -> str:
        """Return the text of `report.json`."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Report:
        """Return what `as_dict` was made of."""
        problems = found["problems"]
        return cls(
            counts=Counter({kind: problem["count"] for kind, problem in problems.items()}),
            first={kind: list(problem["first"]) for kind, problem in problems.items()},
            empty_answers=found["empty_answers"],
        )
