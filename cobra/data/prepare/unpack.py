"""The contents of an archive's members to files, each whole or not there, in as many threads as wanted.

zipfile takes longer to open a member than to copy one of 50 kB, so that stored and deflated contents are read here.
Threads are enough: reading, inflating, CRC and writing all leave Python's lock.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from cobra.data.prepare.members import DAMAGE, Member, damaged, is_compressed, open_source
from cobra.data.progress import progress
from cobra.errors import DataError

_CHUNK = 1 << 20  # bytes
_BATCH_BYTES, _BATCH_FILES = 32 << 20, 512  # what one thread takes at a time
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: magic, lengths of the name and the extra field


def unpack(
    archive: Path, files: Mapping[str, Member], there: Collection[str], target: Path, staging: Path, jobs: int
) -> None:
    """Write members to their paths below a folder.

    Each is written to the folder `staging`, compared with its size and CRC, then renamed.

    Args:
        archive: that the members were listed from.
        files: members by their paths relative to `target`.
        there: paths where a file of the right size lies; it is left alone if its CRC is right as well.
        target: folder; those that the paths need are there.
        staging: empty folder on the same disk.
        jobs: threads; a compressed tar is one stream, which is read in the calling thread.

    Raises:
        DataError: a content is not what the listing says, or cannot be written; it names the member.
    """

    def write(source: IO[bytes], number: int, batch: Sequence[str]) -> int:
        for name in batch:
            path, member = target / name, files[name]
            if name not in there or not _is_whole(archive, source, member, path):
                _write(archive, source, member, path, staging / str(number))
        return sum(files[name].size for name in batch)

    def open_and_write(batch: tuple[int, Sequence[str]]) -> int:
        with open_source(archive) as source:
            return write(source, *batch)

    batches = list(enumerate(_batches(files)))
    with progress(sum(member.size for member in files.values()), archive.name, "B") as bar:
        if is_compressed(archive):
            with open_source(archive) as source:
                for number, batch in batches:
                    bar.update(write(source, number, batch))
            return
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            for written in pool.map(open_and_write, batches):
                bar.update(written)


def same_content(archive: Path, one: Member, other: Member) -> bool:
    """Whether two members hold the same bytes, as far as size and CRC tell."""
    with open_source(archive) as source:
        return one.size == other.size and _crc_of(archive, source, one) == _crc_of(archive, source, other)


def _batches(files: Mapping[str, Member]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name, member in files.items():
        batch.append(name)
        size += member.size
        if size >= _BATCH_BYTES or len(batch) == _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(archive: Path, source: IO[bytes], member: Member, path: Path, temporary: Path) -> None:
    size = crc = 0
    try:
        with temporary.open("wb", buffering=0) as file:
            for data in _content(archive, source, member):
                size += len(data)
                if size > member.size:
                    break
                if member.crc is not None:
                    crc = zlib.crc32(data, crc)
                file.write(data)
        if size != member.size:
            much = "more" if size > member.size else "less"
            raise damaged(archive, member.name, f"holds {much} than the {member.size:,} bytes that are listed")
        if member.crc is not None and crc != member.crc:
            raise damaged(archive, member.name, f"is damaged: its CRC is {crc:08x}, not {member.crc:08x}")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{archive}: cannot write {path}: {error.strerror}.") from None


def _is_whole(archive: Path, source: IO[bytes], member: Member, path: Path) -> bool:
    """Whether a file has the CRC of its member: after a power cut, its size says little."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            crc = zlib.crc32(data, crc)
    return crc == _crc_of(archive, source, member)


def _crc_of(archive: Path, source: IO[bytes], member: Member) -> int:
    if member.crc is not None:
        return member.crc
    crc = 0
    for data in _content(archive, source, member):
        crc = zlib.crc32(data, crc)
    return crc


def _content(archive: Path, source: IO[bytes], member: Member) -> Iterator[bytes]:
    try:
        yield from _unpacked(source, member)
    except DAMAGE as error:
        raise damaged(archive, member.name, f"cannot be read ({str(error) or 'it is cut short'})") from None


def _unpacked(source: IO[bytes], member: Member) -> Iterator[bytes]:
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
