"""Is a data set complete on this disk? Walks its rows and images and says by name what is not in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cobra.config import DataConfig
from cobra.data.images import missing_images, probe_images
from cobra.data.index import Index, open_index
from cobra.data.lengths import text_lengths
from cobra.data.prepare.convert import conversation, write_rows
from cobra.data.report import Report
from cobra.data.sizes import store_sizes
from cobra.errors import DataError
from cobra.runtime import num_cores
from cobra.text.prompt import PromptFormat
from cobra.text.tokenizer import Tokenizer

_NO_LIMIT = 2**30  # tokens of a row


@dataclass(kw_only=True)
class SetReport:
    """What one annotation file and its images hold.

    Attributes:
        name: of the data set.
        rows: that keep to the format.
        text_rows: of these, without an image.
        images: that the rows name.
        missing: images that are no files.
        broken: images that cannot be read, with the reason.
        orphans: files beside the images that no row of the whole mixture names.
        duplicate_ids: rows whose id an earlier row has.
        duplicate_questions: questions that the same image was asked before.
        problems: rows that break the format, and answers that are empty.
        lengths: int32 [rows], text tokens; None: not counted.
    """

    name: str
    rows: int
    text_rows: int
    images: int
    missing: list[str]
    broken: dict[str, str]
    orphans: list[str] = field(default_factory=list[str])
    duplicate_ids: int
    duplicate_questions: int
    problems: Report
    lengths: np.ndarray | None = None

    @property
    def is_good(self) -> bool:
        """Whether every row can be trained on. Duplicates, orphans and empty answers do not hinder that."""
        return not (self.missing or self.broken or self.problems.counts)


@dataclass(kw_only=True)
class CheckReport:
    """What a check found.

    Attributes:
        name: of the data set or benchmark.
        full: whether every image was decoded.
        sets: each annotation file.
        unmet: what the manifest expects and the folder does not hold.
    """

    name: str
    full: bool
    sets: list[SetReport]
    unmet: list[str] = field(default_factory=list[str])

    @property
    def is_good(self) -> bool:
        """Whether all is there."""
        return not self.unmet and all(part.is_good for part in self.sets)


def check(
    config: DataConfig,
    *,
    full: bool = False,
    jobs: int | None = None,
    tokens: tuple[Tokenizer, PromptFormat] | None = None,
) -> CheckReport:
    """Walk the annotations and images of a data set or mixture.

    Args:
        config: the data sets.
        full: decode every image; else their headers are read.
        jobs: processes that read images; None: one for each core.
        tokens: how rows become tokens, to count these; None: they are not counted.

    Raises:
        DataError: an annotation file cannot be read or holds no good row. All else is reported.
    """
    probe = _Prober(full, jobs or num_cores())
    sets: list[SetReport] = []
    named: dict[Path, set[str]] = {}  # by image folder
    for name, part in config.sets.items():
        index = open_index(Path(part.annotations), name, Path(config.index))
        images = Path(part.images).expanduser().absolute()
        names = index.image_names()
        missing = missing_images(images, names)
        sizes, broken = probe(images, names, set(missing), name)
        store_sizes(index, images, sizes)
        duplicate_ids, duplicate_questions = _duplicates(index)
        sets.append(
            SetReport(
                name=name,
                rows=len(index),
                text_rows=int((index.images < 0).sum()),
                images=len(names),
                missing=[names[number] for number in missing],
                broken={names[number]: reason for number, reason in broken.items()},
                duplicate_ids=duplicate_ids,
                duplicate_questions=duplicate_questions,
                problems=index.report(),
                lengths=_lengths(index, name, tokens),
            )
        )
        named.setdefault(images, set()).update(names)
    _find_orphans(config, sets, named)
    return CheckReport(name=config.name, full=full, sets=sets)


def rows_to_check(
    name: str, questions: Iterable[tuple[str, Path, str, str]], folder: Path, index: Path | None = None
) -> DataConfig:
    """Write a benchmark's questions as rows, so that `check` can walk them.

    Args:
        name: of the benchmark.
        questions: id, image, question and true answer of each; the images lie in one folder.
        folder: gets `rows.json`, and the index if `index` is None.
        index: folder of indexes.

    Raises:
        DataError: images lie in several folders, or the rows cannot be written.
    """
    folders = set[Path]()

    def rows() -> Iterator[dict[str, object]]:
        for question_id, image, question, answer in questions:
            folders.add(image.parent)
            yield {"id": question_id, "image": image.name, "conversations": conversation(question, answer)}

    write_rows(folder / "rows.json", rows())
    if len(folders) != 1:
        raise DataError(f"The images of {name} must lie in one folder, not in {', '.join(map(str, sorted(folders)))}.")
    return DataConfig(
        name=name,
        annotations=str(folder / "rows.json"),
        images=str(folders.pop()),
        index=str(index or folder / "index"),
    )


class _Prober:
    """Reads each image once, also where several data sets of a mixture name it."""

    def __init__(self, full: bool, jobs: int) -> None:
        self._read = partial(probe_images, decode=full, jobs=jobs)
        self._known: dict[tuple[Path, str], tuple[int, int, str]] = {}

    def __call__(
        self, folder: Path, names: list[str], missing: set[int], what: str
    ) -> tuple[np.ndarray, dict[int, str]]:
        there = [number for number in range(len(names)) if number not in missing]
        new = [names[number] for number in there if (folder, names[number]) not in self._known]
        found, reasons = self._read(folder, new, what)
        for i, name in enumerate(new):
            self._known[folder, name] = (*found[i].tolist(), reasons.get(i, ""))
        sizes, broken = np.zeros((len(names), 2), np.int32), dict[int, str]()
        for number in there:
            *sizes[number], reason = self._known[folder, names[number]]
            if reason:
                broken[number] = reason
        return sizes, broken


def _duplicates(index: Index) -> tuple[int, int]:
    """Count the rows whose id an earlier row has, and the questions that their image was asked before."""
    ids, questions = list[int](), list[np.ndarray]()
    start = 0
    for rows in index.rows():
        numbers = index.images[start : start + len(rows)].tolist()
        start += len(rows)
        ids += [hash(row.id) for row in rows]
        questions.append(
            np.array(
                [
                    hash((number, question.replace("<image>", "").strip()))
                    for row, number in zip(rows, numbers, strict=True)
                    if number >= 0
                    for question, _ in row.turns
                ],
                np.int64,
            )
        )
    every = np.concatenate(questions)
    return len(ids) - len(set(ids)), len(every) - len(np.unique(every))


def _lengths(index: Index, name: str, tokens: tuple[Tokenizer, PromptFormat] | None) -> np.ndarray | None:
    if tokens is None:
        return None
    return text_lengths(index, name, *tokens, max_length=_NO_LIMIT, captions_only=False)[0]


def _find_orphans(config: DataConfig, sets: list[SetReport], named: dict[Path, set[str]]) -> None:
    """Tell the first set of each image folder about the files there that no set names."""
    for part, report in zip(config.sets.values(), sets, strict=True):
        names = named.pop(Path(part.images).expanduser().absolute(), None)
        if names is None:
            continue
        for directory in sorted({name.rpartition("/")[0] for name in names}):
            folder = Path(part.images).expanduser() / directory
            prefix = f"{directory}/" if directory else ""
            files = (entry.name for entry in os.scandir(folder) if entry.is_file()) if folder.is_dir() else ()
            report.orphans += sorted(prefix + file for file in files if prefix + file not in names)
