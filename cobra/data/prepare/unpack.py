"""The contents of an archive's members to files, each whole or not there, in as many threads as wanted.

zipfile takes longer to open a member than to copy one of 50 kB, so that stored and deflated contents are read here.
Threads are enough: reading, inflating, CRC and writing all leave Python's lock.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from cobra.data.prepare.members import AGAIN, DAMAGE, Member, is_compressed, open_source, refused
from cobra.data.progress import progress
from cobra.errors import DataError

_CHUNK = 1 << 20  # bytes
_BATCH_BYTES, _BATCH_FILES = 32 << 20, 512  # what one thread takes at a time
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: magic, lengths of the name and the extra field


def unpack(archive: Path, members: Sequence[tuple[str, Member]], target: Path, staging: Path, jobs: int) -> None:
    """Write members to their paths below `target`; those that are whole there are left alone.

    Each is written to the folder `staging`, compared with its size and CRC, then renamed.

    Raises:
        DataError: a content is not what the listing says, or cannot be written; it names the member.
    """
    batches = [(staging / str(number), batch) for number, batch in enumerate(_batches(members))]

    def write(batch: tuple[Path, list[tuple[str, Member]]]) -> int:
        with open_source(archive) as source:
            for path, member in batch[1]:
                _write(archive, source, member, target / path, batch[0])
        return sum(member.size for _, member in batch[1])

    if is_compressed(archive):  # one stream
        jobs, batches = 1, [(staging / "0", list(members))]
    total = sum(member.size for _, member in members)
    with progress(total, archive.name, "B") as bar, ThreadPoolExecutor(max(1, jobs)) as pool:
        for written in pool.map(write, batches):
            bar.update(written)


def same_content(archive: Path, one: Member, other: Member) -> bool:
    """Whether two members hold the same bytes, as far as size and CRC tell."""
    with open_source(archive) as source:
        return one.size == other.size and _crc_of(source, one) == _crc_of(source, other)


def _batches(members: Sequence[tuple[str, Member]]) -> Iterator[list[tuple[str, Member]]]:
    batch: list[tuple[str, Member]] = []
    size = 0
    for path, member in members:
        batch.append((path, member))
        size += member.size
        if size >= _BATCH_BYTES or len(batch) == _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(archive: Path, source: IO[bytes], member: Member, path: Path, temporary: Path) -> None:
    try:
        if _is_whole(path, source, member):
            return
        with temporary.open("wb", buffering=0) as file:
            size = crc = 0
            for data in _content(source, member):
                size, crc = size + len(data), zlib.crc32(data, crc)
                if size > member.size:
                    break
                file.write(data)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{archive}: cannot write {path}: {error.strerror}.") from None
        raise refused(archive, member.name, f"cannot be read ({str(error) or 'it is cut short'})", AGAIN) from None
    if size != member.size:
        much = "more" if size > member.size else "less"
        raise refused(archive, member.name, f"holds {much} than the {member.size:,} bytes that are listed", AGAIN)
    if member.crc is not None and crc != member.crc:
        raise refused(archive, member.name, f"is damaged: its CRC is {crc:08x}, not {member.crc:08x}", AGAIN)
    try:
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{archive}: cannot write {path}: {error.strerror}.") from None


def _is_whole(path: Path, source: IO[bytes], member: Member) -> bool:
    """Whether a file is there with the size and CRC of its member: after a power cut, its size alone says little."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != member.size:
        return False
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            crc = zlib.crc32(data, crc)
    return crc == _crc_of(source, member)


def _crc_of(source: IO[bytes], member: Member) -> int:
    if member.crc is not None:
        return member.crc
    crc = 0
    for data in _content(source, member):
        crc = zlib.crc32(data, crc)
    return crc


def _content(source: IO[bytes], member: Member) -> Iterator[bytes]:
    source.seek(member.start)
    if member.label is not None:
        magic, label, extra = _LOCAL_HEADER.unpack(source.read(_LOCAL_HEADER.size))
        if magic != b"PK\3\4" or source.read(label) != member.label:
            raise ValueError("the header before it names something else")
        source.seek(extra, 1)
    left = member.packed
    if not member.deflated:
        while left:
            yield (data := _read(source, left))
            left -= len(data)
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    packed = b""
    while not inflater.eof:
        if not packed and left:
            packed = _read(source, left)
            left -= len(packed)
        data = inflater.decompress(packed, _CHUNK)
        packed = inflater.unconsumed_tail
        if not (data or packed or left or inflater.eof):
            raise EOFError
        yield data


def _read(source: IO[bytes], wanted: int) -> bytes:
    data = source.read(min(wanted, _CHUNK))
    if not data:
        raise EOFError
    return data
