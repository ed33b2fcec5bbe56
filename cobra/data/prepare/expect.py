"""Does a finished folder hold what its manifest expects? Files and rows are counted, nothing is decoded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cobra.data.conversations import read_objects
from cobra.data.prepare.manifest import Expect, Manifest, SourceFile
from cobra.errors import DataError


@dataclass(frozen=True)
class Unmet:
    """What a manifest expects and the folder does not hold.

    Attributes:
        entry: of the manifest.
        text: a sentence for people.
        is_row_count: the file is there and can be read; only the number of its rows is another one.
    """

    entry: Expect
    text: str
    is_row_count: bool = False

    def __str__(self) -> str:
        return self.text


def unmet(manifest: Manifest, root: Path) -> list[Unmet]:
    """Return what a manifest expects below the data folder `root` and is not there."""
    return [found for entry in manifest.expect if (found := _unmet(entry, root / manifest.folder))]


def is_held(file: SourceFile, manifest: Manifest, root: Path) -> bool:
    """Whether all that an archive was to bring is there, from wherever it came; False where nobody knows how much."""
    entries = [entry for entry in manifest.expect if concerns(entry, file, manifest)]
    if not entries or any(entry.count is None and entry.at_least is None for entry in entries):
        return False
    return not any(_unmet(entry, root / manifest.folder) for entry in entries)


def concerns(entry: Expect, file: SourceFile, manifest: Manifest) -> bool:
    """Whether an entry may tell of what an archive brings: it does if one's folder lies within the other's."""
    if file.extract is None:
        return False
    pattern = str(entry.files or entry.rows)
    others = [other.target for other in manifest.files if other.extract is None]
    if pattern in [*others, *(step.target for step in manifest.convert)]:
        return False
    into = PurePosixPath(file.extract.into)
    gathered = [
        PurePosixPath(step.target or ".")
        for step in manifest.convert
        if step.kind == "gather" and PurePosixPath(step.source).is_relative_to(into)
    ]
    place = PurePosixPath(pattern.partition("*")[0].partition("[")[0].rpartition("/")[0])
    return any(place.is_relative_to(folder) or folder.is_relative_to(place) for folder in (into, *gathered))


def count_rows(file: Path, key: str | None = None) -> int:
    """Count the rows of a JSON list, a JSON object or JSON lines, whatever the name ends in.

    Raises:
        DataError: it is no such file, or is cut short.
    """
    with file.open("rb") as handle:
        is_list = handle.read(64).lstrip().startswith(b"[")
    if is_list or file.suffix == ".jsonl":
        return sum(1 for _ in read_objects(file))
    content = file.read_bytes()
    try:
        lines = [line for line in content.splitlines() if line.strip()]
        if key is None and len(lines) > 1 and lines[0].startswith(b"{") and lines[0].rstrip().endswith(b"}"):
            return len([json.loads(line) for line in lines])
        value = json.loads(content)
        return len(value if key is None else value[key])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is not what it should be: {error}. Download it again.") from None


def _unmet(entry: Expect, folder: Path) -> Unmet | None:
    if entry.files is not None:
        count = sum(1 for _ in folder.glob(entry.files))
        what = f"{folder / entry.files}: {count:,} files"
    else:
        found = next(folder.glob(str(entry.rows)), None)
        if found is None:
            return Unmet(entry, f"{folder / str(entry.rows)} is missing")
        try:
            count = count_rows(found, entry.key)
        except DataError as error:
            return Unmet(entry, str(error))
        what = f"{found}: {count:,} rows"
    if entry.count is not None:
        wanted, good = f"{entry.count:,}", count == entry.count
    elif entry.at_least is not None:
        wanted, good = f"{entry.at_least:,} or more", count >= entry.at_least
    else:
        wanted, good = "some", count > 0
    return None if good else Unmet(entry, f"{what}, expected {wanted}", is_row_count=entry.rows is not None)
