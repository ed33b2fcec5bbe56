"""The ablation as tables, a picture, and what became of each of the paper's findings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from cobra.errors import DataError
from cobra.eval.ablation import FULL, LABELS, ROWS, Ablation, Estimate, Verdict, Weights, mean_of, paper_sum
from cobra.eval.markdown import NOTHING, table
from cobra.eval.paper import SOURCE
from cobra.eval.plots import Bar, plot_differences
from cobra.releases import COLUMNS
from cobra.runtime import write_text

BEGIN, END = "<!-- begin: cobra ablation -->", "<!-- end: cobra ablation -->"

_PICTURE = "![differences from the full model, ours and the paper's](ablation.png)"

_CELLS: dict[str, Weights] = {**{column: {column: 1.0} for column in COLUMNS}, "mean": mean_of(COLUMNS)}
_CHANGED = tuple(row for row in ROWS if row != FULL)
_BOXES = ("RefCOCO", "RefCOCO+", "RefCOCOg")
_OTHERS = mean_of([column for column in COLUMNS if column not in _BOXES])
_BOXES_MORE = {**mean_of(_BOXES), **{column: -weight for column, weight in _OTHERS.items()}}
_FEW = 10  # degrees of freedom
_EACH = tuple(_CELLS[column] for column in COLUMNS)


@dataclass(frozen=True)
class Claim:
    """What the paper's numbers say: differences from the full model or another row. All of several must hold."""

    text: str
    rows: tuple[str, ...]
    columns: tuple[Weights, ...]
    against: str = FULL


CLAIMS = (
    Claim("Each change makes the mean of all columns worse", _CHANGED, (_CELLS["mean"],)),
    Claim("SigLIP alone is worse on VSR", ("tiny-siglip",), (_CELLS["VSR"],)),
    Claim("SigLIP alone is worse on RefCOCO, + and g (mean)", ("tiny-siglip",), (mean_of(_BOXES),)),
    Claim("LDPv2 is worse on TextVQA", ("tiny-ldpv2",), (_CELLS["TextVQA"],)),
    Claim(
        "The other language model, here one with fresh weights drawn in another way, is worse on VizWiz and VSR (mean)",
        ("tiny-base",),
        (mean_of(["VizWiz", "VSR"]),),
    ),
    Claim("One epoch is worse in every column", ("tiny-one-epoch",), _EACH),
    Claim("One epoch costs more on RefCOCO, + and g (mean) than elsewhere", ("tiny-one-epoch",), (_BOXES_MORE,)),
    Claim("PT+FT is worse in every column", ("tiny-aligned",), _EACH),
    Claim("PT+FT is worse than one epoch (mean)", ("tiny-aligned",), (_CELLS["mean"],), "tiny-one-epoch"),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim and what became of it; no verdict where evaluations are missing."""

    text: str
    verdict: Verdict | None
    estimates: list[Estimate]

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        if self.verdict is None:
            return f"{self.text}: not evaluated yet."
        if len(self.estimates) == 1:
            one = self.estimates[0]
            low, high = one.interval_95
            numbers = f"{one.ours:+.1f}, interval {low:+.1f} to {high:+.1f}; the paper: {one.paper:+.1f}"
        else:
            counts = Counter(one.verdict for one in self.estimates)
            numbers = f"{len(self.estimates)} differences: " + ", ".join(f"{kind} {n}" for kind, n in counts.items())
        return f"{self.text}: **{self.verdict}** ({numbers})."


def find(ablation: Ablation) -> list[Finding]:
    """Hold what there is against each of the claims."""
    findings: list[Finding] = []
    for claim in CLAIMS:
        found = [ablation.difference(row, one, against=claim.against) for row in claim.rows for one in claim.columns]
        there = [one for one in found if one is not None]
        verdict = _all_of([one.verdict for one in there]) if len(there) == len(found) else None
        findings.append(Finding(text=claim.text, verdict=verdict, estimates=there))
    return findings


def _all_of(verdicts: list[Verdict]) -> Verdict:
    """Return the verdict on a claim that holds only where all of its parts hold."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    wrong: set[Verdict] = {"does not appear", "the opposite appears"}
    return "does not appear" if wrong & set(verdicts) else "cannot be told"


def report(ablation: Ablation) -> str:
    """Return tables and sentences as Markdown, without a title."""
    return "\n".join([*_accuracies(ablation), *_differences(ablation), *_findings(ablation)])


def _accuracies(ablation: Ablation) -> list[str]:
    rows = [
        [
            LABELS[row],
            ", ".join(ablation.runs.get(row, ())) or "none",
            *(_with_span(ablation.accuracy(row, columns)) for columns in _CELLS.values()),
        ]
        for row in ROWS
    ]
    rows.append(["questions", "", *(f"{len(ablation.questions.get(column, ())):,}" for column in COLUMNS), ""])
    text = f"Accuracy in percent by the {ablation.rule} rule, mean over seeds, with 95 % intervals. "
    missing = [f"{LABELS[row]}, seed {seed}: {', '.join(columns)}" for row, seed, columns in _missing(ablation)]
    lines = ["### Accuracy", "", *_wrapped(text + _how_sure(ablation)), ""]
    lines += [*_wrapped(f"Not there: {'; '.join(missing)}."), ""] if missing else []
    return [*lines, *table(["", "seeds", *_CELLS], rows, num_names=2)]


def _how_sure(ablation: Ablation) -> str:
    low, *_, high = sorted(ablation.spread(columns)[1] for columns in _CELLS.values())
    if not high:
        return (
            "**No row has two seeds: the intervals are of the questions alone.** How much another seed would change is "
            "not in them, so all that is said below is about these trainings only."
        )
    found = f"{high} degrees of freedom" if low == high else f"{low} to {high} degrees of freedom, by column"
    return (
        "The intervals hold the questions' part (a bootstrap over images, the same for all rows) and the seeds' part "
        f"(one spread for all rows, with {found}{': barely known' if low < _FEW else ''})."
    )


def _differences(ablation: Ablation) -> list[str]:
    rows: list[list[str]] = []
    for row in _CHANGED:
        rows.append([LABELS[row], *(_difference(ablation.difference(row, columns)) for columns in _CELLS.values())])
        theirs = [paper_sum({row: 1, FULL: -1}, columns) for columns in _CELLS.values()]
        rows.append(["*in the paper*", *(f"*{value:+.1f}*" for value in theirs)])
    text = (
        "Row minus full on the same questions, in percent points; bold where the interval leaves 0 out. The paper's "
        f"({SOURCE}) are of other questions and of models thousands of times larger."
    )
    return ["### Differences from the full model", "", *_wrapped(text), "", *table(["", *_CELLS], rows)]


def _findings(ablation: Ablation) -> list[str]:
    rule = (
        "A difference of the paper's *appears* where our whole 95 % interval is on its side of 0. *The opposite "
        "appears* where it is on the other side. Where 0 is inside, the difference *does not appear* if one as large "
        "as the paper's is outside, and *cannot be told* if it is inside too. A finding about several differences "
        "appears where all do, and does not where one does not."
    )
    sentences = [line for found in find(ablation) for line in _wrapped(f"* {found.sentence}")]
    return ["### The paper's findings", "", *_wrapped(rule), "", *sentences]


def _wrapped(text: str) -> list[str]:
    return wrap(text, 120, subsequent_indent="  " if text.startswith("* ") else "", break_on_hyphens=False)


def _missing(ablation: Ablation) -> Iterator[tuple[str, str, list[str]]]:
    for row in ROWS:
        for seed in ablation.seeds:
            run = ablation.runs.get(row, {}).get(seed)
            lacking = [column for column in COLUMNS if run is None or column not in run.columns]
            if lacking:
                yield row, seed, ["all"] if len(lacking) == len(COLUMNS) else lacking


def _with_span(found: Estimate | None) -> str:
    if found is None:
        return NOTHING
    low, high = found.interval_95
    return f"{found.ours:.1f} ({low:.0f} to {high:.0f})"


def _difference(found: Estimate | None) -> str:
    if found is None:
        return NOTHING
    low, high = found.interval_95
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{found.ours:+.1f}{mark} ({low:+.1f} to {high:+.1f})"


def as_dict(ablation: Ablation) -> dict[str, Any]:
    """Return plain data for JSON."""
    rows: dict[str, Any] = {}
    for row in ROWS:
        rows[row] = {"paper_row": ROWS[row], "by_seed": ablation.accuracies.get(row, {}), "columns": {}}
        for name, columns in _CELLS.items():
            accuracy, difference = ablation.accuracy(row, columns), ablation.difference(row, columns)
            if accuracy:
                rows[row]["columns"][name] = {"accuracy": asdict(accuracy)}
            if difference and row != FULL:
                rows[row]["columns"][name]["difference"] = {
                    **asdict(difference),
                    "verdict": difference.verdict if difference.paper else None,
                }
    return {
        "rule": ablation.rule,
        "questions": {column: len(ids) for column, ids in ablation.questions.items()},
        "rows": rows,
        "findings": [asdict(found) for found in find(ablation)],
    }


def write(folder: Path, ablation: Ablation) -> None:
    """Write ablation.md, ablation.json and ablation.png."""
    write_text(folder / "ablation.json", json.dumps(as_dict(ablation), indent=2) + "\n")
    text = report(ablation).replace("### ", "## ")
    write_text(folder / "ablation.md", f"# The ablation in miniature\n\n{_PICTURE}\n\n{text}\n")
    _plot(folder / "ablation.png", ablation)


def update_page(page: Path, ablation: Ablation) -> None:
    """Put tables and findings between the two marks of a page, and the picture beside it.

    Raises:
        DataError: there is no such page, or it has no marks.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{page} is no page with the marks {BEGIN} and {END}, between which the results belong.")
    write_text(page, f"{before}{BEGIN}\n{_PICTURE}\n\n{report(ablation)}\n{END}{after}")
    _plot(page.with_name("ablation.png"), ablation)


def _plot(file: Path, ablation: Ablation) -> None:
    ours: dict[str, list[Bar]] = {}
    theirs: dict[str, list[Bar]] = {}
    for row in _CHANGED:
        ours[LABELS[row]] = [
            Bar(name=name, percent=found.ours, interval=found.interval_95)
            for name, columns in _CELLS.items()
            if (found := ablation.difference(row, columns))
        ]
        theirs[LABELS[row]] = [
            Bar(name=name, percent=paper_sum({row: 1, FULL: -1}, columns)) for name, columns in _CELLS.items()
        ]
    title = "difference from the full model (percent points, 95 % intervals)"
    plot_differences(file, ours, theirs, list(_CELLS), title)
