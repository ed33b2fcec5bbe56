"""Archives to folders: nothing outside the target, no more than fits, and after a kill the same command goes on.

The whole listing is judged before the first byte is written. A member is written aside and renamed, so that a file
under its own name is whole unless the power failed; a run that was cut off leaves alone what has the listed size and
CRC. When all is there, a note `.<archive>.extracted` in the target says so, and the next run only reads that.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cobra.data.prepare.members import Member, list_members, refused
from cobra.data.prepare.names import Names, RefusedName
from cobra.data.prepare.unpack import same_content, unpack
from cobra.errors import DataError
from cobra.runtime import write_text

log = logging.getLogger(__name__)

_MAX_FILES = 5_000_000  # the largest data set of images has 0.6 million
_MAX_RATIO = 100  # unpacked to packed bytes; JSON has 5 to 20, a bomb 1000 and more
_ALWAYS_ALLOWED = 64 << 20  # bytes, whatever the ratio
_BLOCK = 4096  # bytes of a disk that even a small file takes
_ENDS = 1 << 20  # bytes at both ends of an archive that tell it from another; a zip has its list of CRCs there


def extract(
    archive: Path,
    target: Path,
    *,
    strip: str = "",
    rename: Mapping[str, str] | None = None,
    reserved: Iterable[str] = (),
    max_bytes: int | None = None,
    max_files: int | None = None,
    jobs: int = 1,
) -> int:
    """Extract a zip or tar archive (plain, gzip, bzip2, xz); return the number of its files, all of them in `target`.

    An archive that was deleted after it had been extracted counts as extracted.

    Args:
        archive: told by its content, not by its name.
        target: folder for its members; made if need be.
        strip: a leading folder to leave out; members outside it stay where they are.
        rename: first parts of paths, after that, and what to call them.
        reserved: paths below `target` that belong to something else.
        max_bytes: the most that it may hold; 100 times the archive in any case.
        max_files: the most files and folders.
        jobs: threads. A compressed tar is one stream and takes one.

    Raises:
        DataError: the archive is damaged, no archive, too large, or has a member that could harm; it names both.
    """
    note, staging = (target / f".{archive.name}.{kind}" for kind in ("extracted", "extracting"))
    wanted: dict[str, Any] = {"strip": strip, "rename": dict(sorted((rename or {}).items()))}
    try:
        if archive.exists():
            wanted |= _fingerprint(archive)
        elif not note.is_file():
            raise DataError(f"The archive {archive} does not exist. Download it first.")
        if (done := _read_note(note, wanted)) is not None:
            return done
        if not archive.exists():
            raise DataError(f"The archive {archive} does not exist, and was extracted in another way. Download it.")
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / f".{archive.name}.lock", timeout=0):
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
            log.info("Reading what %s holds.", archive)
            names = _names(archive, strip, rename or {}, reserved)
            files = _plan(archive, names, max_bytes, max_files or _MAX_FILES)
            if strip and not names.stripped:
                raise DataError(f"{archive} has no folder {strip!r} to leave out. It is not the right archive.")
            there = _right_size(files, target)
            _check_disk(archive, [member for path, member in files.items() if path not in there], target)
            _make_folders(archive, names.folders, target)
            staging.mkdir()
            try:
                unpack(archive, files, there, target, staging, jobs)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            if hasattr(os, "sync"):
                os.sync()  # once, not for each file: the note must not reach the disk before them
            write_text(note, json.dumps(wanted | {"files": len(files)}) + "\n")
    except Timeout:
        raise DataError(f"{archive}: another process extracts it into {target} at this moment; wait for it.") from None
    except OSError as error:
        raise DataError(f"{archive}: cannot extract it into {target}: {error}.") from None
    return len(files)


def _names(archive: Path, strip: str, rename: Mapping[str, str], reserved: Iterable[str]) -> Names:
    try:
        return Names(strip, rename, reserved)
    except RefusedName as error:
        raise DataError(f"{archive}: strip={strip!r} or rename={dict(rename)!r} {error}. Correct it.") from None


def _plan(archive: Path, names: Names, max_bytes: int | None, max_files: int) -> dict[str, Member]:
    """Judge every member; return the files by their paths."""
    most = max(_ALWAYS_ALLOWED, _MAX_RATIO * archive.stat().st_size)
    limit = most if max_bytes is None else min(most, max_bytes)
    files: dict[str, Member] = {}
    size = 0
    for count, member in enumerate(list_members(archive, most), start=1):
        size += member.size
        if size > limit:
            raise refused(archive, member.name, f"brings it to {size:,} bytes, more than the {limit:,} allowed")
        if count > max_files:
            raise refused(archive, member.name, f"is one more than the {max_files:,} members allowed")
        if member.is_folder and member.size:
            raise refused(archive, member.name, f"is a folder with a content of {member.size:,} bytes")
        try:
            path = names.place(member.name, is_folder=member.is_folder)
        except RefusedName as error:
            raise refused(archive, member.name, str(error)) from None
        if path is None or member.is_folder:
            continue
        if path in files and not same_content(archive, files[path], member):
            raise refused(archive, member.name, "is there twice, with different contents")
        files[path] = member
    if not files:
        raise DataError(f"{archive} holds no files. It is incomplete, or not the archive that it should be.")
    return files


def _right_size(files: Mapping[str, Member], target: Path) -> set[str]:
    """Return the paths where a file of the right size lies, from a run that was cut off."""
    found: set[str] = set()
    for path, member in files.items():
        try:
            status = (target / path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISREG(status.st_mode) and status.st_size == member.size:
            found.add(path)
    return found


def _check_disk(archive: Path, missing: Iterable[Member], target: Path) -> None:
    needed = sum(-(-member.size // _BLOCK) * _BLOCK for member in missing)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise DataError(
            f"{archive}: needs {needed / 2**30:.1f} GiB in {target}, where {free / 2**30:.1f} GiB are free. "
            "Make room, or choose a folder on another disk."
        )


def _make_folders(archive: Path, folders: list[str], target: Path) -> None:
    for name in folders:
        folder = target / name
        if folder.is_symlink():
            raise DataError(f"{archive}: {folder} is a link, which may lead out of {target}. Remove it.")
        folder.mkdir(exist_ok=True)


def _fingerprint(archive: Path) -> dict[str, Any]:
    """Return what tells an archive from another one without reading all of it."""
    status = archive.stat()
    with archive.open("rb") as file:
        crc = zlib.crc32(file.read(_ENDS))
        file.seek(max(0, status.st_size - _ENDS))
        crc = zlib.crc32(file.read(_ENDS), crc)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "crc_of_ends": crc}


def _read_note(note: Path, wanted: Mapping[str, Any]) -> int | None:
    """Return the number of files if the note says that they were extracted as wanted."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return int(found["files"]) if all(found[key] == value for key, value in wanted.items()) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # not there, or not ours
