"""LLaVA-format conversations: a JSON list (or JSON lines) of rows, and a folder of images.

A row is `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; `image` is a path below the image
folder and absent for text (LLaVA-1.5's format, github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cobra.data.batch import Example
from cobra.errors import DataError
from cobra.hub import open_image
from cobra.text.prompt import IGNORE_INDEX, PromptFormat
from cobra.text.tokenizer import Tokenizer

Transform = Callable[[Image.Image], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One conversation: question-answer turns over at most one image (a path below the image folder)."""

    id: str
    image: str | None
    turns: tuple[tuple[str, str], ...]


def read_rows(annotations: Path) -> list[Row]:
    """Read and check an annotation file.

    Raises:
        DataError: the file is missing or not JSON, or a row breaks the format; the message names the row.
    """
    try:
        text = annotations.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"Cannot read the annotations {annotations}: {error.strerror}. Check data.annotations."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{annotations} is not UTF-8 text ({error}). Check data.annotations.") from None
    try:
        raw = _parse_lines(text) if annotations.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{annotations} is not valid JSON: {error}. Is the file complete?") from None
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{annotations} must hold a non-empty list of conversations in LLaVA's format.")
    return [_parse(row, f"{annotations}, row {i}") for i, row in enumerate(raw)]


def _parse_lines(text: str) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(f"line {number} of the file: {error.msg}", error.doc, error.pos) from None
    return rows


def _parse(row: Any, where: str) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise DataError(f'{where}: not an object with a "conversations" list.')
    where = f"{where} (id {row.get('id')!r})"
    image, messages = row.get("image"), row["conversations"]
    if image is not None and not isinstance(image, str):
        raise DataError(f'{where}: "image" must be a path below the image folder, not {image!r}.')
    if image is not None and (image.startswith("/") or ".." in Path(image).parts):
        raise DataError(f'{where}: "image" {image!r} leaves the image folder; give a path below it.')
    for i, message in enumerate(messages):
        role = ("human", "gpt")[i % 2]
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise DataError(f'{where}: message {i} must be {{"from": ..., "value": text}}.')
        if message.get("from") != role:
            raise DataError(f"{where}: message {i} is from {message.get('from')!r}, expected {role!r}.")
    if not messages or len(messages) % 2:
        raise DataError(f"{where}: the conversation has no answer; it must end with a message from 'gpt'.")
    values = [message["value"] for message in messages]
    return Row(id=str(row.get("id")), image=image, turns=tuple(zip(values[::2], values[1::2], strict=True)))


def digest(rows: Sequence[Row]) -> str:
    """Return a fingerprint of the rows: the same text and image names in the same order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(repr((row.id, row.image, row.turns)).encode())
    return sha.hexdigest()[:16]


class ConversationDataset:
    """Rows and images -> examples. Indexed by *units*: tuples of row numbers that share an image."""

    def __init__(
        self,
        rows: Sequence[Row],
        image_folder: Path,
        tokenizer: Tokenizer,
        prompt: PromptFormat,
        transform: Transform,
        *,
        max_length: int | None = None,
        captions_only: bool = False,
    ) -> None:
        """Join rows, images and text tools.

        Args:
            rows: what `read_rows` returns.
            image_folder: where the rows' image paths start.
            tokenizer, prompt: text to ids.
            transform: image to pixels.
            max_length: text tokens of a row; longer rows are cut. None: no limit.
            captions_only: the align stage, which learns the first answer without its question.
        """
        self.rows = rows
        self.image_folder = image_folder
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.transform = transform
        self.max_length = max_length
        self.captions_only = captions_only

    def __getitem__(self, unit: Sequence[int]) -> Example:
        """Load the rows of one unit with the image that they share."""
        image = self.rows[unit[0]].image
        pixels = None if image is None else self.transform(open_image(self.image_folder / image))
        return Example(pixels=pixels, rows=[self._tokenize(self.rows[r]) for r in unit])

    def _tokenize(self, row: Row) -> tuple[list[int], list[int]]:
        render = self.prompt.caption if self.captions_only else self.prompt.conversation
        ids: list[int] = []
        labels: list[int] = []
        for segment in render(row.turns):
            piece = self.tokenizer.encode(segment.text)
            ids += piece
            labels += piece if segment.is_answer else [IGNORE_INDEX] * len(piece)
        return ids[: self.max_length], labels[: self.max_length]

    def check_labels(self) -> None:
        """Tokenise every row once.

        Raises:
            DataError: rows are cut so short by `max_length` that nothing of their answers is left.
        """
        cut = [row.id for row in self.rows if all(label == IGNORE_INDEX for label in self._tokenize(row)[1])]
        if cut:
            raise DataError(
                f"{len(cut)} of {len(self.rows)} rows have no answer within model.max_length={self.max_length} tokens, "
                f"the first is {cut[0]!r}. Raise model.max_length, or remove these rows."
            )

    def check_images(self, *, decode: bool) -> None:
        """Look for every image once; with `decode`, also decode it.

        Raises:
            DataError: images are missing (the first ones are named) or one does not decode.
        """
        names = dict.fromkeys(row.image for row in self.rows if row.image is not None)
        if names and not self.image_folder.is_dir():
            raise DataError(f"The image folder {self.image_folder} does not exist. Check data.images.")
        missing = [name for name in names if not (self.image_folder / name).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise DataError(
                f"{len(missing)} of {len(names)} images are missing in {self.image_folder}: {shown}. "
                "Check data.images, or remove their rows."
            )
        if decode:
            for name in names:
                open_image(self.image_folder / name)
