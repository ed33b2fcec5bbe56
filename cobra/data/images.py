"""Are the images of a data set there, and do they decode?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from cobra.data.progress import progress
from cobra.errors import DataError
from cobra.hub import open_image

_THREADS = 16  # decoding leaves Python's lock, and reading from a network disk is mostly waiting


def missing_images(folder: Path, names: Sequence[str]) -> list[int]:
    """Return the numbers of the images that are no files below `folder`.

    Every directory is listed once, which a network disk does much faster than it answers for each file.
    """
    directories: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        directories.setdefault(name.rpartition("/")[0], []).append(number)
    missing: list[int] = []
    for directory, numbers in directories.items():
        files = _files(folder / directory)
        missing += [number for number in numbers if names[number].rpartition("/")[2] not in files]
    return sorted(missing)


def broken_images(folder: Path, names: Sequence[str], what: str) -> dict[int, str]:
    """Decode every image; return the number of each one that does not, with the reason."""

    def reason(number: int) -> str | None:
        try:
            open_image(folder / names[number])
        except DataError as error:
            return str(error)
        return None

    broken: dict[int, str] = {}
    numbers = iter(range(len(names)))
    with progress(len(names), f"images of {what}", "image") as bar, ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(numbers, 64 * _THREADS)):
            found = zip(some, pool.map(reason, some), strict=True)
            broken.update((number, text) for number, text in found if text is not None)
            bar.update(len(some))
    return broken


def _files(directory: Path) -> set[str]:
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def state_of_images(folder: Path, names: Sequence[str]) -> str:
    """Return a fingerprint that changes when any image is written: sizes in bytes and times."""
    sha = hashlib.sha256()
    for name in names:
        try:
            stat = (folder / name).stat()
            sha.update(b"%d %d\n" % (stat.st_size, stat.st_mtime_ns))
        except OSError:
            sha.update(b"missing\n")
    return sha.hexdigest()
