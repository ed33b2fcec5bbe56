"""A file that is not complete yet: `<name>.part`, and `<name>.part.json` with what of it is good."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cobra.errors import DataError
from cobra.runtime import flush_to_disk, write_text

_FORMAT = 1
_HASH_BLOCK = 4 * 2**20  # bytes

Range = tuple[int, int]  # [start, stop)


class Partial:
    """The bytes of one file that have arrived so far, in any order; survives the end of the process at any moment.

    Attributes:
        path: of the file while it grows.
        size: bytes that the complete file must have; None: any.
        checksum: "sha256:<hex>" or "md5:<hex>" of the complete file; None: any.
        total: bytes of the complete file as its mirror says; None: not known yet.
        validators: by address, what changes when the file there does.
        sources: the addresses that the present bytes came from.
        bad: addresses whose bytes did not have the checksum, and what they had.
        one_source: bytes of several mirrors must not be joined, as that has failed.
    """

    def __init__(self, target: Path, size: int | None, checksum: str | None, on_bytes: Callable[[int], None]):
        self._target, self._on_bytes = target, on_bytes
        self.size, self.checksum = size, checksum.lower() if checksum is not None else None
        self.path, self._notes = _part_of(target), _notes_of(target)
        self._lock = threading.Lock()
        self._ranges: list[Range] = []
        self._unsaved = False
        self.total = size
        self.validators: dict[str, str] = {}
        self.sources: set[str] = set()
        self.bad: dict[str, str] = {}
        self.one_source = False
        self._restart_hash()
        self._load()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.trim()

    @property
    def present(self) -> int:
        """Bytes that are here."""
        with self._lock:
            return sum(stop - start for start, stop in self._ranges)

    @property
    def can_be_checked(self) -> bool:
        """Something will tell whether the file is right in the end."""
        return self.size is not None or self.checksum is not None

    def gap(self, claimed: Iterable[Range] = ()) -> Range | None:
        """Return the first range that is neither here nor claimed; its end is -1 while the size is unknown."""
        position = 0
        with self._lock:
            taken = sorted([*self._ranges, *claimed])
        for start, stop in taken:
            if start > position:
                return position, start
            position = max(position, stop)
        if self.total is None:
            return position, -1
        return (position, self.total) if position < self.total else None

    def add(self, start: int, stop: int) -> None:
        """Note that these bytes have been written to the file."""
        with self._lock:
            merged: list[Range] = []
            for one in sorted([*self._ranges, (start, stop)]):
                if merged and one[0] <= merged[-1][1]:
                    merged[-1] = (merged[-1][0], max(merged[-1][1], one[1]))
                else:
                    merged.append(one)
            self._ranges = merged
            self._unsaved = True
        self._on_bytes(stop - start)

    def trim(self) -> None:
        """Cut off what lies behind the last good byte: it would stay as the tail of a file that has become shorter."""
        with self._lock, self.path.open("r+b") as file:
            file.truncate(max((stop for _, stop in self._ranges), default=0))

    def drop(self) -> None:
        """Forget every byte."""
        self._on_bytes(-self.present)
        self._ranges, self._unsaved = [], True
        self.total = self.size
        self.validators, self.sources = {}, set()
        self._restart_hash()
        self.trim()
        self.save()

    def save(self) -> None:
        """Write down what is here. The bytes reach the disk first: after a power cut, too, notes tell the truth."""
        with self._lock:
            if not self._unsaved:
                return
            notes = {
                "format": _FORMAT,
                "size": self.size,
                "checksum": self.checksum,
                "total": self.total,
                "ranges": self._ranges,
                "validators": dict(self.validators),
                "sources": sorted(self.sources),
                "bad": dict(self.bad),
                "one_source": self.one_source,
            }
            self._unsaved = False
        flush_to_disk(self.path)
        write_text(self._notes, json.dumps(notes, indent=1) + "\n")

    def _load(self) -> None:
        if not self.path.is_file():
            return
        try:
            notes: dict[str, Any] = json.loads(self._notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if notes.get("format") != _FORMAT or [notes["size"], notes["checksum"]] != [self.size, self.checksum]:
            return
        self.bad, self.one_source = notes["bad"], notes["one_source"]
        if self.checksum is None and not notes["validators"]:
            return  # nothing would tell whether the file has changed in between
        self.total, self.validators, self.sources = notes["total"], notes["validators"], set(notes["sources"])
        length = self.path.stat().st_size
        self._ranges = [(start, min(stop, length)) for start, stop in notes["ranges"] if start < length]

    def hash_some(self, limit: int) -> bool:
        """Continue the checksum where bytes have arrived without a gap, over `limit` bytes at most.

        They are read back: the machine still has them in memory, and any number of connections may have brought them.

        Returns:
            True: there is more to do.
        """
        if self._hash is None:
            return False
        with self._lock:
            front = self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0
        stop = min(front, self._hashed + limit)
        if self._hashed < stop:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._hashed)
                while self._hashed < stop:
                    block = memoryview(self._block)[: min(_HASH_BLOCK, stop - self._hashed)]
                    count = file.readinto(block)
                    if not count:
                        raise self._changed()
                    self._hash.update(block[:count])
                    self._hashed += count
        return self._hashed < front

    def wrong_checksum(self) -> str | None:
        """Return the checksum of the whole file where it is another than the one expected."""
        if self._hash is None:
            return None
        while self.hash_some(2**30):
            pass
        found = f"{self._hash.name}:{self._hash.hexdigest()}"
        return None if found == self.checksum else found

    def _restart_hash(self) -> None:
        self._hash = hashlib.new(self.checksum.partition(":")[0]) if self.checksum is not None else None
        self._hashed = 0
        self._block = bytearray(_HASH_BLOCK if self._hash is not None else 0)

    def finish(self) -> None:
        """Give the complete file its name.

        Raises:
            DataError: it has another size than what was brought.
        """
        if self.path.stat().st_size != self.total:
            raise self._changed()
        flush_to_disk(self.path)
        self.path.replace(self._target)
        self._notes.unlink(missing_ok=True)

    def _changed(self) -> DataError:
        return DataError(
            f"{self.path} has {self.path.stat().st_size} bytes now, and not those that were written: something else "
            "changes it; end that, and start the same command again."
        )


def has_partial(target: Path) -> bool:
    """Whether something of an unfinished file is on the disk."""
    return _part_of(target).exists() or _notes_of(target).exists()


def remove_partial(target: Path) -> None:
    """Delete what is on the disk of an unfinished file."""
    for path in (_part_of(target), _notes_of(target)):
        path.unlink(missing_ok=True)


def present_bytes(target: Path) -> int:
    """Return how many bytes of an unfinished file are on the disk."""
    try:
        notes = json.loads(_notes_of(target).read_text(encoding="utf-8"))
        return sum(stop - start for start, stop in notes["ranges"]) if _part_of(target).is_file() else 0
    except (OSError, ValueError):
        return 0


def _part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _notes_of(target: Path) -> Path:
    return target.with_name(target.name + ".part.json")
