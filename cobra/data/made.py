"""Data sets that are made when they are asked for: by one process of many, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from cobra.errors import DataError


def make_once(folder: Path, is_there: Callable[[Path], bool], make: Callable[[Path], None]) -> None:
    """Call `make(folder)` unless the data set is there. Any number of processes may: one works, the others wait."""
    folder = folder.expanduser().resolve()
    if is_there(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not is_there(folder):
            make(folder)


@contextmanager
def whole_folder(folder: Path, name: str) -> Generator[Path, None, None]:
    """Give a temporary folder to write into, which becomes `folder` when all is written.

    Raises:
        DataError: the folder holds something else, which stays as it is.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty and holds no {name}; choose another folder, or empty it yourself.")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    if folder.exists():
        folder.rmdir()  # it is empty
    temporary.rename(folder)
