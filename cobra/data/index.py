"""An annotation file as memory-mapped Arrow: validated once, opened at once, shared by all processes of a machine.

A folder of an index holds

    rows.arrow    Arrow IPC stream of `id`, `image` (null: text alone) and `turns` (question, answer, question, ...)
    images.npy    int32, for every row the number of its image, -1 for text
    names.arrow   Arrow IPC stream of `image`: the images by number
    index.json    what it was made of, and which rows were left out because they break the format
    report.json   the same rows and those that cannot be used for another reason, see `cobra.data.health`
    lengths-*.npy lengths in tokens, see `cobra.data.lengths`
    sizes-*.npy   widths and heights of the images, see `cobra.data.sizes`
    images-*.json images that were missing or broken, see `cobra.data.health`

`datasets.Dataset.from_file` opens both Arrow files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from cobra.data.conversations import BadRow, Row, parse_row, read_objects
from cobra.data.progress import progress
from cobra.data.report import Report
from cobra.errors import DataError
from cobra.runtime import flush_to_disk, write_atomically

log = logging.getLogger(__name__)

_FORMAT = 1
_ROWS_PER_BATCH = 1024
_READS_PER_RELEASE = 1000  # each read makes some 64 KiB of the file resident
_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.string()), ("turns", pa.list_(pa.string()))])

T = TypeVar("T")


class Index:
    """The good rows of one annotation file. Nothing is in memory until it is asked for.

    Attributes:
        folder: where it lies.
        images: int32 [rows], the number of each row's image, -1 for text; memory-mapped.
        digest: fingerprint of the rows: the same ids, text and image names in the same order.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.digest: str = facts["digest"]
        self._report = facts["report"]
        self.images: np.ndarray = np.load(folder / "images.npy", mmap_mode="r")
        with (folder / "rows.arrow").open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._batches = pa.ipc.open_stream(pa.py_buffer(self._map)).read_all().to_batches()
        self._reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Callable[[Path, str], Index], tuple[Path, str]]:
        """A process that receives the index opens it anew; nothing is copied."""
        return _reopen, (self.folder, self.digest)

    def row(self, number: int) -> Row:
        """Read one row."""
        self._reads += 1
        if self._reads % _READS_PER_RELEASE == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # or the whole file becomes resident in every worker in the end
        batch, i = self._batches[number // _ROWS_PER_BATCH], number % _ROWS_PER_BATCH
        row_id, image, turns = (batch.column(c)[i].as_py() for c in range(3))
        return Row(id=row_id, image=image, turns=_pairs(turns))

    def rows(self) -> Iterator[list[Row]]:
        """Read all rows in their order, some at a time. They are read, not mapped: memory stays small."""
        with pa.OSFile(str(self.folder / "rows.arrow")) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                columns = (batch.column(c).to_pylist() for c in range(3))
                yield [Row(row_id, image, _pairs(turns)) for row_id, image, turns in zip(*columns, strict=True)]

    def image_names(self) -> list[str]:
        """Return the images' paths by number: the one thing here that takes memory, for as long as it is kept."""
        return _open_stream(self.folder / "names.arrow").column("image").to_pylist()

    def report(self) -> Report:
        """Return what was wrong with the rows that were left out."""
        return Report.from_dict(self._report)


def open_index(annotations: Path, name: str, parent: Path) -> Index:
    """Open the index of an annotation file, making it first where there is none or the file has changed.

    Any number of processes may call this at once: one works, the others wait.

    Args:
        annotations: LLaVA-format `.json` or `.jsonl`.
        name: of the data set, for the folder's name and the progress bar.
        parent: folder of all indexes.

    Raises:
        DataError: the annotations cannot be read, hold no good row, or the index cannot be written.
    """
    annotations = annotations.expanduser().absolute()
    key = hashlib.sha256(str(annotations).encode()).hexdigest()[:12]
    folder = parent.expanduser().absolute() / f"{name}-{key}"
    source = _source(annotations)

    def find() -> Index | None:
        try:
            return Index(folder) if _is_made_of(folder, source) else None
        except (OSError, ValueError):  # a file of it is gone or damaged
            return None

    def make() -> Index:
        with _new_folder(folder) as temporary:
            _build(annotations, name, temporary, source)
        return Index(folder)

    return found_or_made(folder, find, make)


def found_or_made(folder: Path, find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """Return what `find` finds, or else what `make` makes, while every other process that asks for `folder` waits.

    Raises:
        DataError: the folder cannot be written.
    """
    found = find()
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            found = find()  # another process may have made it while this one waited
            return found if found is not None else make()
    except OSError as error:
        raise DataError(
            f"Cannot write the index {folder}: {error.strerror or error}. Set data.index to a folder with room in it "
            "that can be written."
        ) from None


def array_found_or_made(folder: Path, file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array in a file, memory-mapped; written from what `make` returns where it is missing or damaged.

    Raises:
        DataError: the folder cannot be written.
    """

    def find() -> np.ndarray | None:
        try:
            return np.load(file, mmap_mode="r")
        except (OSError, ValueError):  # not there, or damaged
            return None

    def write() -> np.ndarray:
        array = make()
        write_atomically(file, lambda temporary: np.save(temporary, array))
        return np.load(file, mmap_mode="r")

    return found_or_made(folder, find, write)


def _source(annotations: Path) -> dict[str, Any]:
    """What tells whether an index still belongs to a file."""
    try:
        stat = annotations.stat()
    except OSError as error:
        raise DataError(
            f"Cannot read the annotations {annotations}: {error.strerror}. Check data.annotations."
        ) from None
    return {"format": _FORMAT, "annotations": str(annotations), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_made_of(folder: Path, source: dict[str, Any]) -> bool:
    try:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(facts.get(key) == value for key, value in source.items())


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; it takes the place of `folder` once all is written. Its lock is held."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for left_over in (temporary, old):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for file in temporary.iterdir():
        flush_to_disk(file)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _build(annotations: Path, name: str, folder: Path, source: dict[str, Any]) -> None:
    report, sha = Report(), hashlib.sha256()
    images: list[pa.Array] = []
    with (
        progress(source["bytes"], f"index of {name}", "B") as bar,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
    ):
        for rows in _batches(_good_rows(annotations, report, bar.update)):
            turns = [[value for turn in row.turns for value in turn] for row in rows]
            columns = [[row.id for row in rows], [row.image for row in rows], turns]
            batch = pa.record_batch(columns, schema=_SCHEMA)
            writer.write_batch(batch)
            images.append(batch.column("image"))
            for row in rows:
                sha.update(repr((row.id, row.image, row.turns)).encode())
    if not images:
        raise DataError(
            f"{annotations} holds no good row: {report}. Is it in LLaVA's format? Questions and answers become it "
            "with: cobra prepare own.annotations=FILE own.images=FOLDER"
        )
    _number_images(images, folder)
    (folder / "report.json").write_text(report.as_json(), encoding="utf-8")
    facts = {**source, "digest": sha.hexdigest()[:16], "report": report.as_dict()}
    (folder / "index.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _good_rows(annotations: Path, report: Report, on_bytes: Callable[[int], object]) -> Iterator[Row]:
    for number, raw in enumerate(read_objects(annotations, on_bytes)):
        try:
            row = parse_row(raw, number)
        except BadRow as problem:
            named = "" if problem.id is None else f" (id {problem.id!r})"
            report.add(problem.kind, f"row {number}{named}: {str(problem).rstrip('.')}")
            continue
        report.empty_answers += sum(not answer.strip() for _, answer in row.turns)
        yield row


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _number_images(images: list[pa.Array], folder: Path) -> None:
    """Number the images in the order of their first rows, outside of Python's memory."""
    encoded: list[Any] = pc.dictionary_encode(pa.chunked_array(images)).chunks  # type: ignore[attr-defined]
    numbers = np.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in encoded]).astype(np.int32)
    np.save(folder / "images.npy", numbers)
    names = pa.table([encoded[-1].dictionary], names=["image"])  # the chunks share one dictionary
    with pa.OSFile(str(folder / "names.arrow"), "wb") as sink, pa.ipc.new_stream(sink, names.schema) as writer:
        writer.write_table(names)


def _open_stream(file: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _pairs(turns: list[str]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(turns[::2], turns[1::2], strict=True))


def _reopen(folder: Path, digest: str) -> Index:
    index = Index(folder)
    if index.digest != digest:
        raise DataError(f"The index {folder} was made anew while this run used it. Start the run again.")
    return index
