"""LLaVA-format conversations: a JSON list (or JSON lines) of rows, read as a stream.

A row is `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; `image` is a path below the image
folder and absent for text (LLaVA-1.5's format, github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md). `id` is a
string or a number.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cobra.errors import DataError

_CHUNK = 2**20  # bytes read at once
MAX_ROW = 2**24  # characters of one row; more means that a bracket is missing somewhere

_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Row:
    """One conversation: question-answer turns over at most one image (a path below the image folder)."""

    id: str
    image: str | None
    turns: tuple[tuple[str, str], ...]


class BadRow(Exception):
    """A row that breaks the format: its `id` where it has one, the `kind` of problem, and a sentence about it."""

    def __init__(self, row_id: str | None, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.id, self.kind = row_id, kind


def read_rows(annotations: Path) -> list[Row]:
    """Read and check a whole annotation file that fits in memory.

    Raises:
        DataError: the file is missing or not JSON, or a row breaks the format; the message names the row.
    """
    rows: list[Row] = []
    for number, raw in enumerate(read_objects(annotations)):
        try:
            rows.append(parse_row(raw, number))
        except BadRow as problem:
            named = "" if problem.id is None else f" (id {problem.id!r})"
            raise DataError(f"{annotations}, row {number}{named}: {problem}") from None
    return rows


def read_objects(annotations: Path, on_bytes: Callable[[int], object] = lambda _: None) -> Iterator[Any]:
    """Yield the rows of an annotation file as they are, in memory that does not grow with the file.

    Args:
        annotations: a JSON list, or JSON lines where the name ends in `.jsonl`.
        on_bytes: called with the number of bytes whenever some have been read.

    Raises:
        DataError: the file cannot be read, is not such JSON, or holds no row.
    """
    chunks = _chunks(annotations, on_bytes)
    count = 0
    for row in _lines(annotations, chunks) if annotations.suffix == ".jsonl" else _list(annotations, chunks):
        yield row
        count += 1
    if not count:
        raise _not_a_list(annotations)


def parse_row(raw: Any, number: int) -> Row:
    """Check row `number` of a file.

    Raises:
        BadRow: it breaks the format.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise BadRow(None, "not an object", 'not an object with a "conversations" list.')
    row_id = f"row {number}" if raw.get("id") is None else str(raw["id"])
    image, messages = raw.get("image"), raw["conversations"]
    if image is not None and not isinstance(image, str):
        raise BadRow(
            row_id, "image is not a path", f'"image" must be a path below the image folder, not {image!r:.80}.'
        )
    if image is not None and (image.startswith("/") or (".." in image and ".." in PurePosixPath(image).parts)):
        raise BadRow(
            row_id, "image leaves the folder", f'"image" {image!r} leaves the image folder; give a path below it.'
        )
    values: list[str] = []
    for i, message in enumerate(messages):
        role = ("human", "gpt")[i % 2]
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise BadRow(row_id, "not a message", f'message {i} must be {{"from": ..., "value": text}}.')
        if message.get("from") != role:
            raise BadRow(
                row_id,
                "roles do not alternate",
                f"message {i} is from {message.get('from')!r:.80}, expected {role!r}.",
            )
        values.append(message["value"])
    if not values or len(values) % 2:
        raise BadRow(row_id, "no answer", "the conversation has no answer; it must end with a message from 'gpt'.")
    try:
        "".join([row_id, image or "", *values]).encode()
    except UnicodeEncodeError:
        raise BadRow(
            row_id.encode("ascii", "backslashreplace").decode(),
            "not Unicode",
            "its text holds half of a surrogate pair; write it as UTF-8.",
        ) from None
    return Row(id=row_id, image=image, turns=tuple(zip(values[::2], values[1::2], strict=True)))


def _chunks(annotations: Path, on_bytes: Callable[[int], object]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with annotations.open("rb") as file:
            while data := file.read(_CHUNK):
                yield decoder.decode(data)
                on_bytes(len(data))
        yield decoder.decode(b"", final=True)
    except OSError as error:
        raise DataError(
            f"Cannot read the annotations {annotations}: {error.strerror}. Check data.annotations."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{annotations} is not UTF-8 text ({error}). Check data.annotations.") from None


def _lines(annotations: Path, chunks: Iterator[str]) -> Iterator[Any]:
    number, rest = 0, ""
    for chunk in _and_end(chunks, "\n"):
        *lines, rest = (rest + chunk).split("\n")  # not splitlines: JSON text may hold other line separators
        for line in lines:
            number += 1
            try:
                if line.strip():
                    yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _not_json(annotations, f"line {number} of the file: {error}") from None
        if len(rest) > MAX_ROW:
            raise _not_json(annotations, f"line {number + 1} of the file is longer than {MAX_ROW:,} characters")


def _list(annotations: Path, chunks: Iterator[str]) -> Iterator[Any]:
    """Decode one row after the other from a window over the text."""
    text = _Window(chunks)
    if text.peek() != "[":
        if text.peek() == "{":
            raise _not_a_list(annotations)
        raise _not_json(annotations, "it does not start with '['")
    text.position += 1
    number = 0
    while text.peek() != "]":
        if number:
            if text.peek() != ",":
                raise _not_json(annotations, f"after row {number - 1} stands {text.peek()!r} instead of ',' or ']'")
            text.position += 1
            text.peek()
        try:
            yield text.next_value()
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise _not_json(annotations, f"row {number}, character {text.offset + text.position:,}: {reason}") from None
        number += 1
    text.position += 1
    if text.peek():
        raise _not_json(annotations, f"more text follows the list at character {text.offset + text.position:,}")


class _Window:
    """The part of a text that is being decoded. `offset` characters of the text have left the window."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.chunks, self.text, self.position, self.offset = chunks, "", 0, 0

    def peek(self) -> str:
        """Skip white space; return the next character, "" at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in " \t\r\n":
                    return self.text[self.position]
                self.position += 1
            if not self._extend(1):
                return ""

    def next_value(self) -> Any:
        """Decode the value at the position and step behind it; the window grows until the value is complete."""
        size = _CHUNK
        while True:
            is_full = len(self.text) - self.position > MAX_ROW
            try:
                value, end = _decode(self.text, self.position)
                # Without a delimiter behind it, a number may go on in the next chunk.
                if self.text[end : end + 1] in tuple(",] \t\r\n") or is_full or not self._extend(size):
                    self.position = end
                    return value
            except json.JSONDecodeError:
                if is_full or not self._extend(size):
                    raise
            size *= 2  # each try starts anew: as many tries as doublings

    def _extend(self, size: int) -> bool:
        """Drop what has been decoded and read `size` characters or more; False at the end of the text."""
        parts, length = [self.text[self.position :]], 0
        self.offset += self.position
        self.position = 0
        for chunk in self.chunks:
            parts.append(chunk)
            length += len(chunk)
            if length >= size:
                break
        self.text = "".join(parts)
        return length > 0


def _and_end(chunks: Iterator[str], end: str) -> Iterator[str]:
    yield from chunks
    yield end


def _not_json(annotations: Path, reason: str) -> DataError:
    return DataError(f"{annotations} is not valid JSON: {reason}. Is the file complete?")


def _not_a_list(annotations: Path) -> DataError:
    return DataError(f"{annotations} must hold a non-empty list of conversations in LLaVA's format.")
