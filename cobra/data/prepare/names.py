"""Names inside an archive: where each goes below the target folder, and which are refused.

What is refused does not depend on the machine: an archive that would lose a file on a Mac (names that differ only by
case) or write elsewhere on Windows (drive letters, backslashes) is refused on Linux as well, so that a data set is the
same everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # the last: bytes that are not UTF-8
_DRIVE = re.compile(r"[A-Za-z]:")
_OURS = re.compile(  # as downloads, extraction and the run as a whole call their own files
    r"\..*\.(extracted|extracting|lock|prepared|verified)|.*\.part(\.json)?", re.IGNORECASE
)
_LONGEST_PART, _LONGEST_NAME = 255, 2048  # bytes; of most file systems, and half of what Linux takes with the target


class RefusedName(ValueError):
    """Why a name is refused: the end of a sentence that begins with the name."""


class Names:
    """The files and folders that an archive makes, looked at one by one."""

    def __init__(self, strip: str, rename: Mapping[str, str], reserved: Iterable[str] = ()) -> None:
        """Take the leading folder to leave out, the first parts that get another name, and paths not to write to."""
        self._strip = parts_of(strip) if strip else ()
        self._rename = {old: parts_of(new) for old, new in rename.items()}
        self._reserved = {_folded(path) for path in reserved}
        self._files: dict[str, str] = {}  # what a file system that is not strict about names sees: as it is spelled
        self._folders: dict[str, str] = {}
        self._known: set[str] = set()  # folders that need no second look
        self.stripped = 0

    @property
    def folders(self) -> list[str]:
        """Every folder that is needed, parents first."""
        return sorted(self._folders.values())

    def place(self, name: str, *, is_folder: bool) -> str | None:
        """Return the path of a member relative to the target, None when it is left out.

        Raises:
            RefusedName: the name leads out of the target, cannot be written everywhere, or contradicts another one.
        """
        parts = parts_of(name)
        if not parts or "__MACOSX" in parts or parts[-1] == ".DS_Store" or parts[-1].startswith("._"):  # from a Mac
            return None
        length = len(self._strip)
        if self._strip and parts[:length] == self._strip:
            parts = parts[length:]
            self.stripped += 1
            if not parts and not is_folder:
                raise RefusedName("is a file, and as a folder it was to be left out (strip)")
        elif is_folder and parts == self._strip[: len(parts)]:
            return None
        if parts and parts[0] in self._rename:
            parts = self._rename[parts[0]] + parts[1:]
        if not parts:
            return None
        if any(_OURS.fullmatch(part) for part in (parts[0], parts[-1])):
            raise RefusedName("has a name that is kept for notes about what was fetched and extracted")
        if _folded("/".join(parts)) in self._reserved:
            raise RefusedName("has the name of another file of the data set")
        if is_folder:
            self._add_folder(parts)
        else:
            self._add_file(parts)
        return "/".join(parts)

    def _add_file(self, parts: tuple[str, ...]) -> None:
        self._add_folder(parts[:-1])
        path = "/".join(parts)
        key = _folded(path)
        if key in self._folders:
            raise RefusedName("is a file where another member needs a folder")
        _same_spelling(path, self._files.setdefault(key, path))

    def _add_folder(self, parts: tuple[str, ...]) -> None:
        path = "/".join(parts)
        if not parts or path in self._known:
            return
        self._add_folder(parts[:-1])
        key = _folded(path)
        if key in self._files:
            raise RefusedName(f"needs a folder where {self._files[key]!a} is a file")
        _same_spelling(path, self._folders.setdefault(key, path))
        self._known.add(path)


def parts_of(name: str) -> tuple[str, ...]:
    """Split a name at its slashes.

    Raises:
        RefusedName: it could lead out of a folder, or some file system cannot keep it as it is.
    """
    if _UNPRINTABLE.search(name):
        raise RefusedName("has NUL, control characters or bytes that are not UTF-8 in its name")
    if "\\" in name:
        raise RefusedName("has a backslash in its name, which leads elsewhere on Windows")
    if name.startswith("/"):
        raise RefusedName("has an absolute path")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise RefusedName("leads out of its folder (..)")
    if any(_DRIVE.match(part) for part in parts):
        raise RefusedName("names a drive")
    if any(not part.strip(". ") for part in parts):
        raise RefusedName("has a part of nothing but dots and spaces")
    if len(name.encode()) > _LONGEST_NAME or any(len(part.encode()) > _LONGEST_PART for part in parts):
        raise RefusedName(f"has a name too long for file systems ({_LONGEST_PART} bytes a part, {_LONGEST_NAME} all)")
    return parts


def _folded(path: str) -> str:
    """Return what two names share if any common file system takes one for the other (macOS, Windows, exFAT)."""
    if not path.isascii():
        path = unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())
    return "/".join(part.rstrip(". ") for part in path.lower().split("/"))


def _same_spelling(path: str, first: str) -> None:
    if path != first:
        raise RefusedName(
            f"differs from {first!a} only by case, Unicode form or a dot or space at the end, "
            "and many file systems take both for one"
        )
