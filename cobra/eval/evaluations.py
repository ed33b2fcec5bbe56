"""Finished evaluations on disk, found by folder or by the model's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cobra.errors import DataError
from cobra.eval.benchmark import MEAN
from cobra.eval.files import expecting, read_json, read_json_lines


class Scored(NamedTuple):
    """One question's score, and what it is grouped by."""

    score: float
    image: str
    part: str


@dataclass(frozen=True)
class Run:
    """One model's scores by one rule: column -> question id -> score."""

    name: str
    columns: dict[str, dict[str, Scored]] = field(default_factory=dict[str, dict[str, Scored]])


def read_runs(names: Sequence[str], results: Path, rule: str) -> list[Run]:
    """Read several models' evaluations.

    Args:
        names: an evaluation's folder, a folder of such folders, or a model's name or run folder.
        results: the folder that evaluations are written to, `<results>/<benchmark>/<model>`.
        rule: whose scores to read.

    Raises:
        DataError: there is no such evaluation, it is not finished, or it has no such rule.
    """
    ends = [Path(name).name for name in names]
    labels = ends if len(set(ends)) == len(ends) else list(names)
    if len(set(labels)) < len(labels):
        raise DataError(f"{', '.join(names)}: a run is named twice.")
    runs: list[Run] = []
    for name, label in zip(names, labels, strict=True):
        run = Run(label)
        for folder in _folders(name, results):
            found = _read(folder, rule)
            doubled = sorted(found.keys() & run.columns.keys())
            if doubled:
                raise DataError(f"{name} has two evaluations of {', '.join(doubled)}; name the folder of one of them.")
            run.columns.update(found)
        runs.append(run)
    return runs


def shared_questions(column: str, runs: Sequence[Run]) -> list[str]:
    """Return the ids of the questions of a column that all runs have answered, in the first one's order.

    Raises:
        DataError: they are about other images in one of the runs.
    """
    first = runs[0].columns.get(column, {})
    shared = [one for one in first if all(one in run.columns.get(column, {}) for run in runs[1:])]
    for run in runs[1:]:
        theirs = run.columns.get(column, {})
        other = next((one for one in shared if first[one].image != theirs[one].image), None)
        if other is not None:
            raise DataError(
                f"{column}, question {other}: {runs[0].name} saw {first[other].image}, {run.name} saw "
                f"{theirs[other].image}. They were evaluated on different data."
            )
    return shared


def _folders(name: str, results: Path) -> list[Path]:
    """Return the evaluation folders that a name stands for."""
    folder = Path(name).expanduser()
    if (folder / "results.json").is_file():
        return [folder]
    found = sorted(file.parent for file in folder.glob("*/results.json"))
    benchmarks = sorted(results.iterdir()) if results.is_dir() else []
    for model in (name, folder.name):
        found = found or [one / model for one in benchmarks if (one / model / "results.json").is_file()]
    if found:
        return found
    if (folder / "predictions.jsonl").is_file():
        raise DataError(f"{folder} has predictions but no results.json: finish its evaluation with the same command.")
    raise DataError(
        f"{name} is no evaluation: there is no results.json in it, in folders in it, or in {results}/*/{name}. "
        f"Make one: cobra evaluate benchmark=... model={name}"
    )


def _read(folder: Path, rule: str) -> dict[str, dict[str, Scored]]:
    file = folder / "scores.jsonl"
    if not file.is_file():
        raise DataError(f"{folder} has no scores.jsonl; the same evaluation again writes it and asks nothing anew.")
    with expecting(folder / "results.json", "the results of scripts/evaluate.py"):
        columns: Mapping[str, Any] = read_json(folder / "results.json")["columns"]
    rows = read_json_lines(file)
    with expecting(file, "the scores of scripts/evaluate.py"):
        if rows and rule not in rows[0]:
            rules = [key for key, value in rows[0].items() if isinstance(value, float)]
            raise DataError(f"{folder} has no scores by the rule {rule!r}; it has {', '.join(rules)}.")
        counted = [
            (str(row["question_id"]), Scored(float(row[rule]), row["image"], row["part"]))
            for row in rows
            if row["counts"]
        ]
    found: dict[str, dict[str, Scored]] = {}
    for column, about in columns.items():
        found[column] = {one: scored for one, scored in counted if about["part"] in (scored.part, MEAN)}
    return found
