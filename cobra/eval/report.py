"""Everything that one evaluation leaves behind beside its predictions: numbers, tables, pictures, examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cobra.eval import gallery, page, plots
from cobra.eval.benchmark import MEAN, OFFICIAL, PAPER, Benchmark, Prediction, Question, Scores
from cobra.eval.markdown import percent, plain, signed, span, table
from cobra.eval.paper import DEFAULT, NOTES, ROWS, SOURCE, asked_as_in_paper, comparable, row_name
from cobra.eval.scoring import write_scores
from cobra.runtime import write_text

RULES = {OFFICIAL: "official", PAPER: "paper's rule"}


def write(
    folder: Path,
    facts: Mapping[str, Any],
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Mapping[str, Prediction],
    scores: Scores,
    title: str,
) -> dict[str, Any]:
    """Write results.json, scores.jsonl, report.md, examples.html and the pictures; return what results.json holds.

    Args:
        folder: made if it is not there.
        facts: benchmark, model, settings, times: they open results.json and close report.md.
        benchmark: knows ids and right answers.
        questions: those that were asked.
        answers: by question id.
        scores: of the answers.
        title: above the pictures.
    """
    results = results_of(facts, benchmark, scores)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_scores(folder, benchmark, questions, scores, with_image=True)
    pictures = plots.plot_breakdowns(folder, scores, title)
    chosen = gallery.choose_examples(questions, scores, num_wrong=4, num_all=12)
    gallery.plot_examples(folder / "examples.png", gallery.examples(benchmark, chosen, answers, scores), title)
    page.write_page(folder / "examples.html", benchmark, questions, answers, scores, title)
    lines = [*_head(results, scores), *_scores(results, benchmark, scores), *_details(scores), *_breakdowns(scores)]
    lines += ["## Pictures", ""]
    lines += [f"![{picture.stem.replace('_', ' ')}]({picture.name})\n" for picture in pictures]
    lines += ["![examples](examples.png)", "", "[More examples, to filter and search](examples.html)", ""]
    lines += ["## Settings", "", *(f"* {key}: {plain(str(value))}" for key, value in facts.items())]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    return results


def remove(folder: Path) -> None:
    """Remove what an earlier, smaller evaluation has written: it must not be taken for that of new answers."""
    for name in ("results.json", "scores.jsonl", "report.md", "examples.html", "examples.png", "by_*.png"):
        for file in folder.glob(name):
            file.unlink()


def results_of(facts: Mapping[str, Any], benchmark: Benchmark, scores: Scores) -> dict[str, Any]:
    """Return what results.json holds; numbers are in percent, apart from counts."""
    name = row_name(str(facts["model"]))
    columns: dict[str, Any] = {}
    for column, part in scores.columns.items():
        total = next(iter(scores.parts.values()))[part].num_questions
        is_fair = asked_as_in_paper(facts, benchmark, part)
        reference, is_whole = comparable(name, column, part, total, is_fair=is_fair)
        columns[column] = {
            "part": part,
            "questions": total,
            "reference": reference,
            "is_whole": is_whole,  # the reference is of the same questions
            "rules": {
                rule: {"accuracy": parts[part].accuracy, "interval_95": list(parts[part].interval)}
                for rule, parts in scores.parts.items()
            },
        }
    return {
        **facts,
        "num_questions": scores.overall.total,
        "accuracy": scores.overall.percent,
        "interval_95": list(scores.overall.interval),
        "by_type": _first_breakdown(scores),
        "paper_row": name,
        "columns": columns,
        "rules": scores.as_dict(),
    }


def _first_breakdown(scores: Scores) -> dict[str, Any]:
    """Return the parts, where there are several, or else the types of the first breakdown, by the main rule."""
    parts = next(iter(scores.parts.values()))
    if len(parts) > 1:
        return {
            name: {"accuracy": part.accuracy, "num_questions": part.num_questions}
            for name, part in parts.items()
            if name != MEAN
        }
    (part,) = parts.values()
    tallies = next(iter(part.by_type.values()), None) or {}
    return {kind: {"accuracy": tally.percent, "num_questions": tally.total} for kind, tally in tallies.items()}


def _head(results: Mapping[str, Any], scores: Scores) -> list[str]:
    columns = scores.columns
    part = next(iter(columns.values()))
    if len(columns) > 1:
        what = f" This is the mean of {', '.join(map(plain, columns))}."
    elif part == MEAN:
        what = " This is the mean of the parts."
    else:
        what = f" This is the part {plain(part)}." if part else ""
    return [
        f"# {plain(str(results['benchmark']))}: {plain(str(results['model']))}",
        "",
        f"**{scores.overall.percent:.2f} %** of {scores.overall.total:,} questions "
        f"(95 % interval: {span(scores.overall.interval)}; bootstrap over images).{what}",
        "",
    ]


def _scores(results: Mapping[str, Any], benchmark: Benchmark, scores: Scores) -> list[str]:
    """One row per part: both rules, and where the paper has a number, that and how far the paper's rule is from it."""
    name = str(results["paper_row"])
    column_of = {part: column for column, part in scores.columns.items()}
    totals = {part: numbers.num_questions for part, numbers in next(iter(scores.parts.values())).items()}
    fair = {part: asked_as_in_paper(results, benchmark, part) for part in totals}
    found = {
        part: comparable(name, column_of.get(part), part, total, is_fair=fair[part]) for part, total in totals.items()
    }
    has_paper = PAPER in scores.parts and any(reference is not None for reference, _ in found.values())
    head = ["part", "questions"]
    for rule in scores.parts:
        head += [f"{RULES.get(rule, rule)} (%)", "95 % interval"]
    head += [f"{ROWS[name].label} in the paper", "difference"] * has_paper
    rows: list[list[str]] = []
    for part, (reference, is_whole) in found.items():
        row = [plain(part or str(results["benchmark"])), f"{totals[part]:,}"]
        for parts in scores.parts.values():
            row += [percent(parts[part].accuracy), span(parts[part].interval)]
        if has_paper:
            ours = scores.parts[PAPER][part].accuracy
            row += [percent(reference), signed(ours - reference if reference is not None and is_whole else None)]
        rows.append(row)
    lines = ["## Scores", "", *table(head, rows)]
    if has_paper:
        lines += [*_on_the_paper(results, scores, all(is_whole for value, is_whole in found.values() if value)), ""]
    return lines


def _on_the_paper(results: Mapping[str, Any], scores: Scores, is_whole: bool) -> list[str]:
    name = str(results["paper_row"])
    lines = [f"The paper ({SOURCE}) was scored by the paper's rule, so that is what the difference is taken from."]
    if row_name(str(results["model"]), default="") != name:
        lines.append(f"This model is none of the paper's; its row {ROWS[DEFAULT].label} stands for them.")
    if not is_whole:
        chosen = [f"{key}={results[key]}" for key in ("limit", "subset") if results.get(key) is not None]
        reason = f" ({', '.join(chosen)})" if chosen else ""
        lines.append(
            f"Where the paper's number has no difference beside it, it is of other questions than these{reason}: that "
            "would be **no fair comparison**."
        )
    return lines + [note for (row, column), note in NOTES.items() if row == name and column in scores.columns]


def _details(scores: Scores) -> list[str]:
    """Return further numbers, one row per part, under each rule."""
    names = list(
        dict.fromkeys(key for parts in scores.parts.values() for part in parts.values() for key in part.details)
    )
    if not names:
        return []
    rows: list[list[str]] = []
    for rule, parts in scores.parts.items():
        for name, part in parts.items():
            values = [part.details.get(key) for key in names]
            cells = [f"{value:,}" if isinstance(value, int) else percent(value) for value in values]
            rows.append([RULES.get(rule, rule), plain(name), *cells])
    head = ["rule", "part", *(name.replace("_", " ") for name in names)]
    return ["## Details", "", *table(head, rows, num_names=2)]


def _breakdowns(scores: Scores) -> list[str]:
    """One table per breakdown: part x type, each rule in a column."""
    main = next(iter(scores.parts.values()))
    lines: list[str] = []
    for name in dict.fromkeys(name for part in main.values() for name in part.by_type):
        rows: list[list[str]] = []
        for part, numbers in main.items():
            for kind, tally in numbers.by_type.get(name, {}).items():
                values = [percent(parts[part].by_type[name][kind].percent) for parts in scores.parts.values()]
                rows.append([plain(part), plain(kind), *values, f"{tally.total:,}"])
        head = ["part", plain(name), *(f"{RULES.get(rule, rule)} (%)" for rule in scores.parts), "questions"]
        if set(main) == {""}:  # nothing to tell apart
            head, rows = head[1:], [row[1:] for row in rows]
        lines += [f"## By {plain(name)}", "", *table(head, rows, num_names=1 + (set(main) != {""}))]
    return lines
