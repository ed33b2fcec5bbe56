"""Are the images of a data set there, do they decode, and how large are they?"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cobra.data.progress import progress
from cobra.errors import DataError
from cobra.hub import open_image

_THREADS = 16  # decoding leaves Python's lock, and reading from a network disk is mostly waiting
_PER_TASK = 256  # images that a process gets at once


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


def probe_images(
    folder: Path, names: Sequence[str], what: str, *, decode: bool, jobs: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Read the size of every image from its first bytes, or decode it all, in several processes.

    Args:
        folder, names: the images.
        what: name of the data set, for the progress bar.
        decode: whether each image is decoded; else only its header is read.
        jobs: processes; few images are read in this one.

    Returns:
        int32 [images, 2], width and height, 0 where they cannot be read; and the number of each image that cannot be
        used, with the reason.

    Raises:
        DataError: a process was killed, for want of memory say.
    """
    sizes, broken = np.zeros((len(names), 2), np.int32), dict[int, str]()
    tasks = [[folder / name for name in names[i : i + _PER_TASK]] for i in range(0, len(names), _PER_TASK)]
    probe = partial(_probe, decode=decode)
    with progress(len(names), f"images of {what}", "image") as bar:

        def collect(number: int, found: list[tuple[int, int, str]]) -> None:
            for i, (width, height, reason) in enumerate(found, start=number * _PER_TASK):
                sizes[i] = width, height
                if reason:
                    broken[i] = reason
            bar.update(len(found))

        if jobs == 1 or len(tasks) <= 1:
            for number, task in enumerate(tasks):
                collect(number, probe(task))
        else:
            try:
                # spawned: a forked child of a process with threads may hang
                with ProcessPoolExecutor(jobs, get_context("spawn"), _leave_ctrl_c) as pool:
                    for number, found in enumerate(pool.map(probe, tasks)):
                        collect(number, found)
            except BrokenProcessPool:
                raise DataError(
                    f"A process that read images of {what} was killed, perhaps for want of memory; use fewer jobs."
                ) from None
    return sizes, broken


def _leave_ctrl_c() -> None:
    """The terminal sends Ctrl-C to every process; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _probe(files: Sequence[Path], *, decode: bool) -> list[tuple[int, int, str]]:
    return [_probe_one(file, decode) for file in files]


def _probe_one(file: Path, decode: bool) -> tuple[int, int, str]:
    """Return width, height and what is wrong."""
    try:
        if decode:
            return (*open_image(file).size, "")
        with Image.open(file) as image:
            return (*image.size, "")
    except DataError as error:
        return 0, 0, str(error)
    except UnidentifiedImageError:
        return 0, 0, "unknown format or damaged"
    except Exception as error:  # decoders of damaged files raise anything
        return 0, 0, str(getattr(error, "strerror", None) or error)


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
