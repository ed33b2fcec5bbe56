"""A user's own JSON, JSON lines or CSV and image folder -> LLaVA's format and a data config, or all that is wrong.

A row has the columns `image`, `question` and `answer` (and `id` if you like), or LLaVA's `conversations`. Rows without
an image are text alone.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cobra.data.conversations import BadRow, Row, parse_row
from cobra.data.images import broken_images, missing_images
from cobra.data.prepare.convert import conversation, text_of, write_rows
from cobra.errors import ConfigError, DataError
from cobra.runtime import write_text

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_SHOWN = 20  # problems in the error; a file has all
_MARK = "# Made by cobra.data.prepare.own"
_IMAGE = "<image>"  # in LLaVA's messages it stands where the image goes; a question of one's own needs none
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Problem:
    """What is wrong with the row that begins in a line of the file."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def prepare_own(annotations: Path, images: Path, name: str, output: Path, configs: Path) -> Path:
    """Check own data to the last row and image, convert it, and write the config that `data=<name>` finds.

    Args:
        annotations: `.json` (a list), `.jsonl` or `.csv` (with a header), UTF-8.
        images: folder that the rows' image paths start from; it is only read.
        name: of the data set.
        output: folder that gets `<name>.json`, and `<name>-problems.txt` if there are any.
        configs: the folder `configs/data`, or the YAML file to write.

    Returns:
        The data config.

    Raises:
        ConfigError: `name` cannot be one, or there is a config of this name that was not made here.
        DataError: something is wrong with the data; the message has the first problems, the text file all.
    """
    config = configs if configs.suffix in (".yaml", ".yml") else configs / f"{name}.yaml"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name={name!r} is no name for a data set; use letters, digits, '-', '_' and '.'.")
    if config.exists() and not config.read_text(encoding="utf-8").startswith(_MARK):
        raise ConfigError(f"{config} exists and was written by somebody else; choose another name, or remove it.")
    if not images.is_dir():
        raise DataError(f"There is no image folder {images}. Give the folder that the rows' image paths start from.")
    rows, problems = _read(annotations)
    problems += _bad_images(rows, images, name) + _repeated_ids(rows)
    list_of_problems = output / f"{name}-problems.txt"
    if problems or not rows:
        problems.sort(key=lambda problem: problem.line)
        _refuse(annotations, problems, list_of_problems)
    list_of_problems.unlink(missing_ok=True)
    write_rows(output / f"{name}.json", (_as_llava(row) for _, row in rows))
    write_text(config, _config(name, output / f"{name}.json", images, annotations))
    return config


def _read(annotations: Path) -> tuple[list[tuple[int, Row]], list[Problem]]:
    """Return the good rows with the lines in which they begin, and what is wrong with the others."""
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv}
    reader = readers.get(annotations.suffix.lower())
    if reader is None:
        raise DataError(f"{annotations} must end in {', '.join(readers)}; its ending tells how it is read.")
    try:
        text = annotations.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {annotations}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{annotations} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    rows: list[tuple[int, Row]] = []
    problems: list[Problem] = []
    for number, (line, raw) in enumerate(reader(text)):
        try:
            if isinstance(raw, Problem):
                problems.append(raw)
            else:
                rows.append((line, _row(raw, number)))
        except BadRow as problem:
            problems.append(Problem(line, str(problem)))
    return rows, problems


def _json(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a list, each with its line; what is no JSON ends it."""
    skip = re.compile(r"[ \t\r\n]*")
    line, counted = 1, 0

    def at(position: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    def behind_space(position: int) -> int:
        found = skip.match(text, position)
        return found.end() if found else position

    position = behind_space(0)
    if text[position : position + 1] != "[":
        yield at(position), Problem(at(position), "the file is no JSON list: it does not start with '['.")
        return
    position = behind_space(position + 1)
    while text[position : position + 1] != "]":
        start = at(position)
        try:
            value, position = _decode(text, position)
        except (ValueError, RecursionError) as error:  # ValueError itself: an integer of more digits than Python reads
            yield start, Problem(getattr(error, "lineno", start), f"not JSON: {getattr(error, 'msg', error)}.")
            return
        yield start, value
        position = behind_space(position)
        if text[position : position + 1] not in (",", "]"):
            found = text[position : position + 1] or "the end"
            yield start, Problem(at(position), f"after a row stands {found} instead of ',' or ']'.")
            return
        if text[position] == ",":
            comma, position = position, behind_space(position + 1)
            if text[position : position + 1] == "]":
                yield start, Problem(at(comma), "a comma follows the last row.")
                return
    if (end := behind_space(position + 1)) < len(text):
        yield at(end), Problem(at(end), "more text follows the list.")


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Problem(number, f"not JSON: {error}.")


def _csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield start, Problem(start, f"not CSV: {error}.")
            continue  # with the next line
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip().lower() for cell in cells]
            if lacking := {"image", "question", "answer"} - set(header):
                names = ", ".join(sorted(lacking))
                yield start, Problem(start, f"the header {','.join(cells)!r:.80} lacks {names}; separate with commas.")
                return
            if twice := sorted({name for name in header if header.count(name) > 1}):
                yield start, Problem(start, f"the header has {', '.join(twice)} more than once.")
                return
        elif len(cells) != len(header):
            yield (
                start,
                Problem(start, f"{len(cells)} cells, not {len(header)} as the header; quote texts with commas."),
            )
        else:
            yield start, dict(zip(header, cells, strict=True))


def _row(raw: Any, number: int) -> Row:
    """Check one row of either kind; an empty image is none, as CSV cannot say it otherwise."""
    if not isinstance(raw, dict):
        raise BadRow(None, "", f"not an object with image, question and answer, but {raw!r:.60}.")
    image = raw.get("image") or None
    if "conversations" not in raw:
        question, answer = (text_of(raw, key).replace(_IMAGE, "").strip() for key in ("question", "answer"))
        messages = conversation(question, answer)
        raw = {**raw, "conversations": messages if image else [{"from": "human", "value": question}, messages[1]]}
    row_id = None if raw.get("id") in (None, "") else raw["id"]
    row = parse_row({**raw, "id": row_id, "image": image}, number)
    if any(not value.strip() for turn in row.turns for value in turn):
        raise BadRow(row.id, "", "a message is empty.")
    return row


def _bad_images(rows: list[tuple[int, Row]], images: Path, what: str) -> list[Problem]:
    """Look at every image once; each row that uses a bad one is a problem."""
    names = list(dict.fromkeys(row.image for _, row in rows if row.image is not None))
    bad = dict.fromkeys(missing_images(images, names), "is no file below the image folder.")
    there = [number for number in range(len(names)) if number not in bad]
    broken = broken_images(images, [names[number] for number in there], what)
    bad |= {there[i]: f"cannot be used: {reason}" for i, reason in broken.items()}
    reasons = {names[number]: reason for number, reason in bad.items()}
    return [Problem(line, f"image {row.image} {reasons[row.image]}") for line, row in rows if row.image in reasons]


def _repeated_ids(rows: list[tuple[int, Row]]) -> list[Problem]:
    first: dict[str, int] = {}
    problems = list[Problem]()
    for line, row in rows:
        if first.setdefault(row.id, line) != line:
            problems.append(Problem(line, f"id {row.id!r} is that of line {first[row.id]}, too."))
    return problems


def _refuse(annotations: Path, problems: list[Problem], file: Path) -> None:
    if not problems:
        raise DataError(f"{annotations} holds no row.")
    write_text(file, "".join(f"{problem}\n" for problem in problems))
    shown = [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(f"  ... and {len(problems) - _SHOWN:,} more.")
    raise DataError(
        "\n".join([f"{annotations} has {len(problems):,} problems. Mend them and start again (all: {file}):", *shown])
    )


def _as_llava(row: Row) -> dict[str, Any]:
    messages = [
        {"from": role, "value": value} for turn in row.turns for role, value in zip(("human", "gpt"), turn, strict=True)
    ]
    image = {} if row.image is None else {"image": row.image}
    return {"id": row.id, **image, "conversations": messages}


def _config(name: str, rows: Path, images: Path, source: Path) -> str:
    def quoted(path: Path) -> str:
        return json.dumps(str(path.expanduser().absolute()), ensure_ascii=False)  # YAML reads JSON's texts

    return f"""{_MARK} from {source.name}.
name: {name}
annotations: {quoted(rows)}
images: {quoted(images)}
source: null
rows_per_image: 1           # questions of one image that share one reading of it in a step
check: exists               # every image was decoded when this was made
index: ${{paths.data}}/index  # memory-mapped copies of annotation files
mix: {{}}                     # several data sets instead of annotations and images
on_bad_example: error       # error | skip (leave the row out, count it, write its id to bad_examples.jsonl)
"""
