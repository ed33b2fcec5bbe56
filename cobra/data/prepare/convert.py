"""Annotations as published -> LLaVA's format; images into the folder where the rows look for them.

The same input always gives the same bytes, and a file that has them already stays untouched: its index stays valid.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cobra.data.conversations import BadRow, parse_row, read_objects
from cobra.data.progress import progress
from cobra.data.report import Report
from cobra.errors import DataError
from cobra.runtime import flush_to_disk

log = logging.getLogger(__name__)


def convert_lvis(source: Path, target: Path) -> int:
    """Convert LVIS-Instruct-4V, which is LLaVA's format already: the rows in order, image paths below one folder.

    Args:
        source: `lvis_instruct4v_220k.json`.
        target: the new file; its rows name `coco/train2017/...` and `coco/val2017/...`.

    Returns:
        Rows written; those that break the format are left out and named in a warning.

    Raises:
        DataError: the source cannot be read or has no good row.
    """

    def convert(raw: Any, number: int) -> Any:
        image = raw.get("image") if isinstance(raw, dict) else None
        if not isinstance(image, str):
            return raw
        folder, _, name = image.removeprefix("./").rpartition("/")
        split = folder.rpartition("/")[2]
        if split not in ("train2017", "val2017"):
            raise BadRow(str(raw.get("id")), "not a COCO image", f"{image!r} is in neither train2017 nor val2017.")
        kept = {key: raw.get(key) for key in ("id", "conversations")}
        return {**kept, "image": f"coco/{split}/{name}"}

    return _convert(source, target, convert)


def convert_lrv(source: Path, target: Path, image: str) -> int:
    """Convert a file of LRV-Instruct, rows of `image_id`, `question` and `answer`.

    Args:
        source: the file as published.
        target: the new file; ids are `<stem of source>/<row number>`.
        image: path of a row's image with `{image_id}` in it, such as `lrv-vg/{image_id}.jpg`.

    Returns:
        Rows written; those that lack something are left out and named in a warning.

    Raises:
        DataError: the source cannot be read or has no good row.
    """

    def convert(raw: Any, number: int) -> dict[str, Any]:
        values = {key: text_of(raw, key) for key in ("image_id", "question", "answer")}
        return {
            "id": f"{source.stem}/{number}",
            "image": image.replace("{image_id}", values["image_id"]),
            "conversations": conversation(values["question"], values["answer"]),
        }

    return _convert(source, target, convert)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """Return one question about an image and its answer as LLaVA's messages."""
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def gather(source: Path, target: Path, *, replace: bool = False) -> int:
    """Move all files below `source` into `target`, without the folders between: some archives have such folders.

    Started again after a kill it moves what is left.

    Args:
        source: folder of an archive's files; it goes with the last of them.
        target: folder.
        replace: a file of `target` that differs gives way to the one of its name in `source`, if that has only one.

    Returns:
        Files that `target` holds afterwards.

    Raises:
        DataError: two different files have the same name.
    """
    target.mkdir(parents=True, exist_ok=True)
    walked = list(os.walk(source, topdown=False))
    often = Counter(name for _, _, names in walked for name in names)
    for folder, _, names in walked:
        for name in names:
            if not name.startswith("."):  # a note of the extraction, say
                _move(Path(folder) / name, target / name, replace=replace and often[name] == 1)
        with suppress(OSError):  # what was left there stays
            Path(folder).rmdir()
    return sum(1 for entry in os.scandir(target) if entry.is_file())


def _move(file: Path, target: Path, *, replace: bool) -> None:
    if not replace and target.exists() and not filecmp.cmp(file, target, shallow=False):
        raise DataError(
            f"{file} cannot be moved to {target}, which is another file. Remove one of the two; where all names in the "
            "archive differ, repair=true takes the archive's."
        )
    file.replace(target)


def write_rows(target: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as a JSON list, one to a line, whole or not at all; return how many.

    A file that holds the same bytes already stays as it is, with its time.

    Raises:
        DataError: the disk does not take it.
    """
    temporary = target.with_name(f"{target.name}.part")
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(",\n" if count else "[\n")
                file.write(json.dumps(row, ensure_ascii=False))
                count += 1
            file.write("\n]\n" if count else "[]\n")
        if target.is_file() and filecmp.cmp(temporary, target, shallow=False):
            temporary.unlink()
            return count
        flush_to_disk(temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"Cannot write {target}: {error.strerror or error}. Make room, or check the folder.") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return count


def _convert(source: Path, target: Path, convert: Callable[[Any, int], Any]) -> int:
    report = Report()

    def rows() -> Iterator[dict[str, Any]]:
        size = source.stat().st_size if source.is_file() else 0
        with progress(size, f"converting {source.name}", "B") as bar:
            for number, raw in enumerate(read_objects(source, bar.update)):
                try:
                    row = convert(raw, number)
                    parse_row(row, number)
                except BadRow as problem:
                    report.add(problem.kind, f"row {number}: {str(problem).rstrip('.')}")
                    continue
                yield row
            if len(report.counts) and sum(report.counts.values()) == number + 1:
                raise DataError(f"{source} holds no good row: {report}. Is it the right file?")

    count = write_rows(target, rows())
    if report.counts:
        log.warning("%s: %d rows are left out of %s: %s.", source, sum(report.counts.values()), target.name, report)
    return count


def text_of(raw: Any, key: str) -> str:
    """Return a value of a row as text; image ids and answers may be numbers.

    Raises:
        BadRow: it is missing, empty, or neither.
    """
    value = raw.get(key) if isinstance(raw, dict) else None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise BadRow(None, f"no {key}", f"{key!r} must be a text, not {value!r:.80}.")
    return str(value)
