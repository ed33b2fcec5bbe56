"""Archives that harm whoever trusts them: each kind as zip and as tar, with honest members around the hostile one."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

Entries = list[tuple[str, bytes]]
TAR_SUFFIXES = {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.bz2": "bz2", ".tar.xz": "xz"}


class Case(NamedTuple):
    """A hostile archive to be made, and what the error must say."""

    kind: str
    suffix: str
    seed: int
    says: str


# Names that no archive may have: the hostile members, and what the error says of the last of them.
NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "up": (("../canary.txt",), "leads out of its folder"),
    "up-later": (("a/b/../../../canary.txt",), "leads out of its folder"),
    "absolute": (("{outside}/absolute.txt",), "absolute path"),
    "double-slash": (("/{outside}/absolute.txt",), "absolute path"),
    "drive": (("C:/Windows/evil.txt",), "names a drive"),
    "drive-inside": (("a/c:evil.txt",), "names a drive"),
    "backslash": (("..\\canary.txt",), "backslash"),
    "nul": (("evil.txt\0.jpg",), "NUL"),
    "line-break": (("evil\n[ok] all good.txt",), "control characters"),
    "escape": (("evil\x1b[2J.txt",), "control characters"),
    "long-part": (("a" * 256,), "too long"),
    "long-part-in-bytes": (("é" * 128,), "too long"),
    "long-name": (("a/" * 1500 + "b",), "too long"),
    "dots": (("a/.../b",), "nothing but dots"),
    "case": (("Image.jpg", "image.JPG"), "only by case"),
    "folder-case": (("Folder/a.jpg", "folder/b.jpg"), "only by case"),
    "unicode": (("caf\u00e9.jpg", "cafe\u0301.jpg"), "only by case"),
    "dot-at-end": (("image.jpg", "image.jpg."), "only by case"),
    "space-at-end": (("image.jpg", "image.jpg "), "only by case"),
    "folder-over-file": (("x", "x/y"), "is a file"),
    "file-over-folder": (("x/y", "x"), "needs a folder"),
    "twice": (("same.jpg", "same.jpg"), "twice, with different contents"),
    "our-note": ((".other.zip.extracted",), "kept for notes"),
}

MODES = {
    "symbolic-link": (stat.S_IFLNK, tarfile.SYMTYPE, "a symbolic link"),
    "device": (stat.S_IFCHR, tarfile.CHRTYPE, "a device"),
    "block-device": (stat.S_IFBLK, tarfile.BLKTYPE, "a device"),
    "fifo": (stat.S_IFIFO, tarfile.FIFOTYPE, "a FIFO"),
}

ZIP_KINDS = {
    "socket": "a socket",
    "encrypted": "encrypted",
    "deflate64": "deflate64",
    "bomb": "more than the",
    "says-huge": "more than the",
    "inflates-more": "holds more",
    "inflates-less": "holds less",
    "wrong-crc": "its CRC is",
    "flipped-bits": "is damaged|cannot be read|holds",
    "overlap": "overlaps",
    "beyond-the-end": "reaches beyond",
    "other-local-name": "names something else",
    "folder-with-content": "is a folder with a content",
    "cut-short": "cannot read the list of its members",
    "broken-list": "cannot read the list of its members",
    "empty": "holds no files",
    "too-many": "members allowed",
}

TAR_KINDS = {
    "hard-link": "a hard link",
    "sparse": "a sparse file",
    "unknown-type": "of an unknown kind",
    "says-huge": "more than the|is cut short",
    "negative-size": "is a file of -",
    "huge-header": "a header of",
    "endless-headers": "headers without end",
    "cut-in-content": "cannot read the list|is cut short",
    "cut-between": "without the mark of an end|cannot read the list",
    "broken-header": "without the mark of an end",
    "empty": "holds no files|empty",
    "too-many": "members allowed",
}

STREAM_KINDS = {  # of compressed tars
    "bomb": "more than the",
    "bomb-after-the-end": "decompression bomb",
    "stream-cut-short": "cannot read the list",
    "stream-flipped-bits": "cannot read the list|without the mark",
    "not-a-tar": "cannot read the list",
}

NO_ARCHIVES = {
    "web-page": (b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "a web page"),
    "json": (b'{"error": "quota exceeded"}', "JSON"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(64), "a RAR archive"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a pointer of git LFS"),
    "nothing": (b"", "empty"),
    "zeros": (bytes(4096), "empty"),
    "noise": (b"\x01\x02" * 3000, "neither a zip nor a tar"),
}


def all_cases() -> list[Case]:
    cases = []
    for seed in range(2):
        streams = random.Random(seed).sample([*TAR_SUFFIXES][1:], 2)
        for kind, (_, says) in NAMES.items():
            cases += [Case(kind, suffix, seed, says) for suffix in (".zip", ".tar", streams[0])]
        for kind, (_, _, says) in MODES.items():
            cases += [Case(kind, suffix, seed, says) for suffix in (".zip", ".tar", streams[1])]
        cases += [Case(kind, ".zip", seed, says) for kind, says in ZIP_KINDS.items()]
        cases += [Case(kind, suffix, seed, says) for kind, says in TAR_KINDS.items() for suffix in (".tar", streams[0])]
    cases += [Case(kind, suffix, 0, says) for kind, says in STREAM_KINDS.items() for suffix in [*TAR_SUFFIXES][2:]]
    return cases + [Case(kind, ".zip", 0, says) for kind, (_, says) in NO_ARCHIVES.items()]


def make(case: Case, folder: Path, outside: Path) -> Path:
    """Write the archive of a case; `outside` is a folder that it aims at."""
    rng = random.Random(f"{case.kind} {case.suffix} {case.seed}")
    archive = folder / f"archive{case.suffix}"
    entries = [(f"images/{i:03d}.jpg", rng.randbytes(rng.randrange(1, 3000))) for i in range(rng.randrange(2, 8))]
    if case.kind in NO_ARCHIVES:
        archive.write_bytes(NO_ARCHIVES[case.kind][0])
    elif case.kind in NAMES:
        hostile = [(name.replace("{outside}", str(outside)), rng.randbytes(99)) for name in NAMES[case.kind][0]]
        at = rng.randrange(len(entries) + 1)
        entries[at:at] = hostile
        (write_zip if case.suffix == ".zip" else write_tar)(archive, entries)
    elif case.suffix == ".zip":
        _hostile_zip(case.kind, archive, entries, rng)
    else:
        _hostile_tar(case, archive, entries, rng, outside)
    return archive


def write_zip(archive: Path, entries: Entries, change: Callable[[zipfile.ZipInfo], None] | None = None) -> None:
    """Write a zip; every second member is deflated."""
    with zipfile.ZipFile(archive, "w") as file:
        for i, (name, content) in enumerate(entries):
            info = zipfile.ZipInfo("x")
            info.filename = name  # set later: the constructor ends names at a NUL
            info.compress_type = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            info.external_attr = (stat.S_IFREG | 0o7777) << 16  # with the setuid bit
            if change is not None and i == len(entries) - 1:
                change(info)
            file._didModify = True
            file.NameToInfo.pop(name, None)  # no warning about duplicates
            file.writestr(info, content)


def write_tar(archive: Path, entries: Entries, last: tarfile.TarInfo | None = None) -> None:
    """Write a tar as its suffix says; `last` is a header that comes after all others."""
    with tarfile.open(archive, f"w:{TAR_SUFFIXES[''.join(archive.suffixes)]}") as file:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if "\0" in name:
                info.name, info.pax_headers = "short", {"path": name}
            info.size, info.mode = len(content), 0o7777
            file.addfile(info, io.BytesIO(content))
        if last is not None:
            file.addfile(last)


def _hostile_zip(kind: str, archive: Path, entries: Entries, rng: random.Random) -> None:
    def change(info: zipfile.ZipInfo) -> None:
        if kind in MODES or kind == "socket":
            info.external_attr = (MODES[kind][0] if kind in MODES else stat.S_IFSOCK) << 16
        if kind in ("inflates-more", "inflates-less", "flipped-bits", "bomb"):
            info.compress_type = zipfile.ZIP_DEFLATED

    name = {"folder-with-content": "folder/"}.get(kind, "hostile.jpg")
    content = bytes(70 << 20) if kind == "bomb" else b"../canary.txt" * 400
    if kind == "too-many":
        entries += [(f"many/{i}", b"") for i in range(100)]
    write_zip(archive, [] if kind == "empty" else [*entries, (name, content)], change)
    data = bytearray(archive.read_bytes())
    central = data.rfind(b"PK\1\2")  # of the last member
    local = data.rfind(b"PK\3\4")
    if kind == "encrypted":
        data[central + 8] |= 1
    elif kind == "deflate64":
        data[central + 10] = 9
    elif kind == "says-huge":
        data[central + 24 : central + 28] = struct.pack("<I", 4_000_000_000)
    elif kind.startswith("inflates-"):
        data[central + 24 : central + 28] = struct.pack("<I", len(content) + (-1000 if kind == "inflates-more" else 7))
    elif kind == "wrong-crc":
        data[central + 16] ^= 0xFF
    elif kind == "flipped-bits":
        data[local + 30 + len(name) + rng.randrange(4, 20)] ^= 0x5A
    elif kind == "overlap":  # the last one begins where the first does, as in bombs without nesting
        data[central + 42 : central + 46] = struct.pack("<I", 0)
    elif kind == "beyond-the-end":
        data[central + 20 : central + 24] = struct.pack("<I", len(data) + rng.randrange(1000))
    elif kind == "other-local-name":
        data[local + 30] ^= 1
    elif kind == "cut-short":
        del data[rng.randrange(40, len(data) - 25) :]
    elif kind == "broken-list":
        data[central] ^= 0xFF
    archive.write_bytes(data)


def _hostile_tar(case: Case, archive: Path, entries: Entries, rng: random.Random, outside: Path) -> None:
    kind, info = case.kind, tarfile.TarInfo("hostile.jpg")
    if kind in MODES or kind == "hard-link":
        info.type = MODES[kind][1] if kind in MODES else tarfile.LNKTYPE
        info.linkname = str(outside / "canary.txt") if case.seed else "../canary.txt"
    elif kind == "sparse":
        info.type = tarfile.GNUTYPE_SPARSE
    elif kind == "unknown-type":
        info.type = b"Z"
    elif kind == "too-many":
        entries += [(f"many/{i}", b"") for i in range(100)]
    if kind == "empty":
        entries = []
    plain = archive.with_name("plain.tar")
    write_tar(plain, entries, info if info.type != tarfile.REGTYPE else None)
    data = bytearray(plain.read_bytes())
    plain.unlink()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # of the last block that is not zero
    if kind == "says-huge":
        data[end:] = _header("hostile.jpg", 1 << 50) + bytes(1024)
    elif kind == "negative-size":
        data[end:] = _header("hostile.jpg", -512 * rng.randrange(1, 9)) + bytes(1024)
    elif kind == "huge-header":
        data[end:] = _header("x", 1 << 40, tarfile.XHDTYPE) + bytes(1024)
    elif kind == "endless-headers":
        data[end:] = _header("x", 0, tarfile.XHDTYPE) * 3000 + bytes(1024)
    elif kind == "cut-in-content":
        data[end:] = _header("hostile.jpg", 5000) + bytes(rng.randrange(1, 4000))
    elif kind == "cut-between":
        data[end:] = _header("last.jpg", 512) + bytes(512)
    elif kind == "broken-header":
        data[end:] = bytes(100) + b"\xff" * 412 + bytes(1024)
    elif kind == "bomb":
        data[end:] = _header("zeros", 70 << 20) + bytes((70 << 20) + 1024)
    elif kind == "bomb-after-the-end":
        data[end:] = bytes(80 << 20)
    elif kind == "not-a-tar":
        data[:] = b'{"conversations": []}' * 200
    pack = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": partial(lzma.compress, preset=0)}[
        TAR_SUFFIXES[case.suffix]
    ]
    packed = bytearray(pack(bytes(data)))
    if kind == "stream-cut-short":
        del packed[len(packed) - rng.randrange(5, len(packed) // 2) :]
    elif kind == "stream-flipped-bits":
        packed[len(packed) // 2] ^= 0xFF
    archive.write_bytes(packed)


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar header that may say any size, negative ones too."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)
