"""The files of a benchmark on disk: found under any of their names, or listed with where to get them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cobra.errors import DataError


@dataclass(frozen=True)
class Source:
    """A file or folder that a benchmark needs: the names it may have, and where it comes from."""

    names: tuple[str, ...]
    url: str


def locate(root: str, folder: str, sources: Sequence[Source], images: Source) -> tuple[list[Path], Path]:
    """Return where each source lies, and where the images do or should: scoring needs none of them.

    Looked for is below `root/folder`, else below `root` itself.

    Raises:
        DataError: some of the sources are nowhere; the message lists all that is missing, the images included.
    """
    base = Path(root).expanduser() / folder
    found = {source: _find((base, base.parent), source) for source in (*sources, images)}
    if not all(found[source] for source in sources):
        missing = [source for source, path in found.items() if path is None]
        lines = [f"  {' or '.join(source.names)}\n    from {source.url}" for source in missing]
        command = f"All of it comes with: cobra prepare benchmark={folder.replace('-', '')} data_root={root}"
        raise DataError(
            "\n".join([f"{base} lacks {len(missing)} of what is needed (data_root={root}):", *lines, command])
        )
    return [path for source in sources if (path := found[source])], found[images] or base / images.names[0]


def _find(bases: Sequence[Path], source: Source) -> Path | None:
    return next((base / name for base in bases for name in source.names if (base / name).exists()), None)


def read_json(path: Path) -> Any:
    """Read a JSON file; DataError when it is broken."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}. Is the file complete?") from None


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of one JSON value per line; DataError when one is broken."""
    rows: list[Any] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}, is not valid JSON: {error}. Is the file complete?") from None
    return rows


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, texts and numbers; a pickle that asks for anything else could run code, and is refused."""

    def find_class(self, module: str, name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain data. Nothing in the file is executed.

    Raises:
        DataError: the file is broken, or holds other things than lists, dicts, texts and numbers.
    """
    try:
        with path.open("rb") as file:
            value = _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises errors of many kinds
        raise DataError(f"{path} is not a pickle of plain lists and dicts: {error}. Download it again.") from None
    _check_plain(value, path)
    return value


def _check_plain(value: Any, path: Path) -> None:
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (str, int, float)):
            continue
        if not isinstance(item, (dict, list)):
            raise DataError(f"{path} holds a {type(item).__name__}; expected only lists, dicts, texts and numbers.")
        item = cast("dict[Any, Any] | list[Any]", item)
        if id(item) in seen:  # pickles can share parts
            continue
        seen.add(id(item))
        waiting += [*item, *item.values()] if isinstance(item, dict) else item


@contextmanager
def expecting(path: Path, what: str) -> Generator[None, None, None]:
    """Turn the errors of reading rows of another format into one that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        reason = f"a row has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not {what}: {reason}. Is it another file, or another version?") from None


def whole_number(value: object) -> int:
    """Return an id that is a number, or the text of one; ValueError for any other."""
    if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
        return int(value)
    raise ValueError(f"the question_id {value!r} is no whole number")


def some_answers(row: Mapping[str, Any], name: object) -> list[Any]:
    """Return people's answers to the question `name`; ValueError where there are none, as in a test split."""
    answers: list[Any] = row.get("answers") or []
    if not answers:
        raise ValueError(f"question {name} has no answers")
    return answers


def check_unique(path: Path, ids: Sequence[str]) -> None:
    """Raise DataError if an id stands for two questions."""
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))
        raise DataError(f"{path} has two questions with the id {twice}. Download it again.")
