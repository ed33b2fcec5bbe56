"""What an archive says it holds: zip and tar files read to a list, nothing of it believed yet.

zipfile and tarfile read the listings; `cobra.data.prepare.unpack` reads the contents, by the positions found here.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from cobra.errors import DataError

_COMPRESSED: dict[bytes, Callable[[Path], object]] = {  # how a compressed tar begins: what reads it
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_FOREIGN = {  # how a file begins that is neither zip nor tar
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it by hand",
    b"Rar!": "a RAR archive; unpack it by hand",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it by hand",
}
_WRONG = {  # how a file begins that a host sent instead of the archive
    b"version https://git-lfs": "a pointer of git LFS, not the file; fetch it with git lfs pull",
    b"<": "a web page, an error or log-in page perhaps; delete it and download it again",
    b"{": "JSON, an error message perhaps; delete it and download it again",
}
_SPECIAL = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
_METHODS = {1: "shrink", 6: "implode", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd"}
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags of a zip member
_LOCAL_HEADER = 30  # bytes before a zip member's name
_LARGEST_HEADER = 1 << 20  # bytes; tar stores long names as headers of any length, which tarfile reads at once
_AGAIN = "The file is damaged or incomplete; delete it and download it again."
# zipfile, tarfile and their decompressors raise all of these on damaged files.
DAMAGE = (
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class Member:
    """A file or folder of an archive, as its listing describes it."""

    name: str
    is_folder: bool
    size: int  # bytes
    crc: int | None  # CRC-32, where it is known
    start: int  # of its zip header or its content, in what `open_source` gives
    packed: int  # bytes that its content takes there
    deflated: bool
    label: bytes | None  # its name in the header before the content: zip only


class Damaged(DataError):
    """A file that is not what its publisher has: fetching it again may help."""


def damaged(archive: Path, name: str, why: str) -> Damaged:
    """Return the error for one member that shows that the archive is damaged."""
    return Damaged(str(refused(archive, name, why, _AGAIN)))


def refused(archive: Path, name: str, why: str, what_to_do: str = "Do not use this archive.") -> DataError:
    """Return the error for one member, in one line whatever its name is."""
    shown = ascii(name)
    shown = shown if len(shown) <= 80 else f"{shown[:60]}...{shown[-17:]}"
    return DataError(f"{archive}: member {shown} {why}. {what_to_do}")


def is_compressed(archive: Path) -> bool:
    """Whether the members lie in one compressed stream, which can only be read from its start."""
    return _opener(archive) is not None


def open_source(archive: Path, *, buffer: int = 1 << 20) -> IO[bytes]:
    """Open what members' positions count in: the file, or for a compressed tar what it unpacks to."""
    opener = _opener(archive)
    return archive.open("rb", buffering=buffer) if opener is None else cast(IO[bytes], opener(archive))


def list_members(archive: Path, max_bytes: int) -> Iterator[Member]:
    """Yield every member.

    Args:
        archive: zip, tar, or tar compressed by gzip, bzip2 or xz; told by its content, not by its name.
        max_bytes: the most that a compressed tar may unpack to, headers and all.

    Raises:
        DataError: the file is no such archive, is cut short or damaged, or has a member that is no file or folder.
    """
    try:
        with archive.open("rb") as file:
            head = file.read(512)
        if is_compressed(archive) or _is_tar(head):
            yield from _tar_members(archive, max_bytes)
        elif head.startswith(b"PK") or zipfile.is_zipfile(archive):
            yield from _zip_members(archive)
        else:
            raise _no_archive(archive, head)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{archive}: cannot read it: {error.strerror}.") from None
        reason = "headers without end" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise Damaged(f"{archive}: cannot read the list of its members ({reason.splitlines()[0]}). {_AGAIN}") from None


def _opener(archive: Path) -> Callable[[Path], object] | None:
    with archive.open("rb") as file:
        head = file.read(6)
    return next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _no_archive(archive: Path, head: bytes) -> DataError:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            return DataError(f"{archive} is {what}.")
    if not head.strip(b"\0"):
        return Damaged(f"{archive} is empty; delete it and download it again.")
    wrong = [what for magic, what in _WRONG.items() if start.startswith(magic)]
    what = wrong[0] if wrong else "neither a zip nor a tar archive, or its start is damaged; download it again"
    return Damaged(f"{archive} is {what}.")


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        infos, end = file.infolist(), file.start_dir
    covered = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < covered:
            raise refused(archive, info.orig_filename, "overlaps another one, as in a decompression bomb")
        covered = info.header_offset + _LOCAL_HEADER + len(_label(info)) + info.compress_size
        if covered > end:
            raise damaged(archive, info.orig_filename, "reaches beyond the members' part of the file")
    for info in infos:
        name = info.orig_filename if "\0" in info.orig_filename else info.filename  # zipfile ends names at a NUL
        if special := _SPECIAL.get(stat.S_IFMT(info.external_attr >> 16)):
            raise refused(archive, name, f"is {special}")
        if info.flag_bits & _ENCRYPTED:
            raise refused(archive, name, "is encrypted", "Unpack the archive by hand.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
            raise refused(archive, name, f"is compressed by {method}, not deflate", "Unpack the archive by hand.")
        yield Member(
            name=name,
            is_folder=info.is_dir(),
            size=info.file_size,
            crc=info.CRC,
            start=info.header_offset,
            packed=info.compress_size,
            deflated=info.compress_type == zipfile.ZIP_DEFLATED,
            label=_label(info),
        )


def _label(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")


def _tar_members(archive: Path, max_bytes: int) -> Iterator[Member]:
    """List a tar file. A compressed one is read to its end, so that each content's CRC is known and its own tested."""
    compressed = is_compressed(archive)
    with closing(_Watched(archive, max_bytes)) as source:
        file = tarfile.TarFile(fileobj=cast(IO[bytes], source))
        while (info := file.next()) is not None:
            file.members = []  # it would keep them all  # pyright: ignore[reportAttributeAccessIssue]
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise refused(archive, info.name, f"is {_kind(info)}")
            if info.size < 0 or (info.isdir() and info.size):
                raise refused(archive, info.name, f"is a {'folder' if info.isdir() else 'file'} of {info.size:,} bytes")
            if not compressed and info.offset_data + info.size > source.size:
                raise damaged(archive, info.name, "is cut short")
            if compressed and info.offset_data + info.size > source.limit:  # before the time that reading takes
                raise refused(archive, info.name, f"brings it to more than the {source.limit:,} bytes allowed")
            yield Member(
                name=info.name,
                is_folder=info.isdir(),
                size=info.size,
                crc=source.checksum(info.size) if compressed else None,
                start=info.offset_data,
                packed=info.size,
                deflated=False,
                label=None,
            )
        if source.last.strip(b"\0") or len(source.last) < tarfile.BLOCKSIZE:  # tarfile takes anything for the end
            raise tarfile.ReadError("it ends without the mark of an end")
        while compressed and source.read(_LARGEST_HEADER):
            pass


def _kind(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "a sparse file"
    if info.issym() or info.islnk():
        return f"a {'symbolic' if info.issym() else 'hard'} link"
    return "a FIFO" if info.isfifo() else "a device" if info.isdev() else f"of an unknown kind ({info.type!r})"


class _Watched:
    """What tarfile reads a listing from: it refuses reads and lengths that only a hostile file asks for."""

    def __init__(self, archive: Path, max_bytes: int) -> None:
        self._archive = archive
        self._file = open_source(archive, buffer=tarfile.BLOCKSIZE)  # headers lie far from one another
        self.size = archive.stat().st_size
        self.limit = max(max_bytes, self.size) + tarfile.RECORDSIZE
        self.last = b""  # of what was read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self._file.read(size)
        if self._file.tell() > self.limit:
            raise DataError(f"{self._archive} unpacks to more than {self.limit:,} bytes, as a decompression bomb does.")
        return self.last

    def checksum(self, size: int) -> int:
        crc = 0
        while size:
            data = self.read(min(size, _LARGEST_HEADER))
            if not data:
                raise tarfile.ReadError("unexpected end of data")
            crc, size = zlib.crc32(data, crc), size - len(data)
        return crc

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def close(self) -> None:
        self._file.close()
