"""Files from their mirrors: resumed, checked, whole or not there at all.

A file `images.zip` grows as `images.zip.part`, beside `images.zip.part.json` with what of it is good; it gets its name
when size and checksum are right. `.images.zip.verified` remembers that, so that nobody reads 20 GB again to know it;
`.images.zip.lock` lets other processes that want the same file wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from cobra.data.prepare.mirrors import NoMirrorLeft, fetch
from cobra.data.prepare.partial import Partial, has_partial, present_bytes, remove_partial
from cobra.data.prepare.sources import SCHEMES, Interrupted, Refused, Sources
from cobra.data.prepare.transfer import Stopped
from cobra.data.progress import progress
from cobra.errors import DataError
from cobra.runtime import write_text

log = logging.getLogger(__name__)

_LOCK_POLL = 0.5  # seconds
_CHECKSUMS = {"sha256": 64, "md5": 32}  # hexadecimal digits


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that can be fetched.

    Attributes:
        urls: mirrors in order of preference; http, https or file.
        target: where it goes.
        size: bytes, None: not known.
        checksum: "sha256:<hex>" or "md5:<hex>"; None: not known.
    """

    urls: tuple[str, ...]
    target: Path
    size: int | None = None
    checksum: str | None = None

    def __post_init__(self) -> None:
        for url in self.urls:
            if urllib.parse.urlsplit(url).scheme not in SCHEMES:
                raise DataError(f"{self.target.name}: {url!r} is not an address of http, https or file; correct it.")
        name, _, digits = (self.checksum or "").lower().partition(":")
        if self.checksum is not None and _CHECKSUMS.get(name) != len(digits):
            raise DataError(
                f"{self.target.name}: {self.checksum!r} is not a checksum; write sha256:<64 digits> or md5:<32 digits>."
            )


def download(files: Sequence[RemoteFile], *, jobs: int = 4, connections: int = 4) -> None:
    """Fetch the files that are not complete; started again after any end, it goes on where it was.

    Args:
        files: what to fetch.
        jobs: files at once.
        connections: at once for one large file.

    Raises:
        DataError: the disk is too small, or files could not be fetched: each is named, with every mirror's reason.
    """
    wanted: list[RemoteFile] = []
    for file in {file.target: file for file in files}.values():
        if is_complete(file):
            _tidy(file.target)
        else:
            wanted.append(file)
    if not wanted:
        return
    missing = _missing_bytes(wanted)
    _check_space(missing)
    stop, failures = threading.Event(), list[str]()
    with (
        Sources(jobs * connections) as sources,
        _Bar(sum(missing.values())) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        fetches = [pool.submit(_fetch, file, sources, connections, stop, bar) for file in wanted]
        try:
            for file, result in zip(wanted, fetches, strict=True):
                try:
                    result.result()
                except DataError as error:
                    failures.append(str(error))
                except OSError as error:
                    failures.append(f"{file.target} cannot be written: {error.strerror or error}.")
        finally:
            stop.set()  # after Ctrl-C the others end at their next bytes and note what they have
    if failures:
        raise DataError("\n".join(failures))


def is_complete(file: RemoteFile, *, remember: bool = True) -> bool:
    """Whether the target is there with the right size and checksum.

    Args:
        remember: write down that the checksum is right, so that it is computed once.
    """
    if not file.target.is_file():
        return False
    if file.size is not None and file.target.stat().st_size != file.size:
        return False
    if file.checksum is None:
        return True
    with suppress(OSError, ValueError):  # never verified
        if json.loads(_seal_of(file.target).read_text(encoding="utf-8")) == _facts(file.target, file.checksum):
            return True
    log.info("Checking %s", file.target)
    name, _, digits = file.checksum.lower().partition(":")
    found = hashlib.new(name)
    with file.target.open("rb") as content:
        while block := content.read(4 * 2**20):
            found.update(block)
    if found.hexdigest() != digits:
        return False
    if remember:
        _seal(file)
    return True


def remote_sizes(files: Sequence[RemoteFile]) -> list[int | None]:
    """Ask the mirrors how large the files are, for a byte each: not every server answers HEAD as it does GET.

    Returns:
        Bytes, None: no mirror says it.
    """

    def ask(file: RemoteFile) -> int | None:
        for url in file.urls:
            try:
                with sources.open(url, 0, 1) as answer:
                    if answer.total is not None:
                        return answer.total
            except (Refused, Interrupted):
                continue
        return None

    jobs = 8
    with Sources(jobs) as sources, ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(ask, files))


def _fetch(file: RemoteFile, sources: Sources, connections: int, stop: threading.Event, bar: _Bar) -> None:
    """Fetch one file, unless another process has done so in the meantime."""
    file.target.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(file.target)
    waiting = False
    while not stop.is_set():
        try:
            lock.acquire(timeout=_LOCK_POLL)
        except Timeout:
            if not waiting:
                log.info("Another process is fetching %s; waiting for it", file.target)
            waiting = True
            continue
        try:
            if not is_complete(file):
                with bar.named(file.target.name):
                    part = Partial(file.target, file.size, file.checksum, bar.add)
                    try:
                        fetch(file.urls, part, sources, connections=connections, stop=stop)
                    except BaseException:
                        part.save()
                        raise
                    part.finish()
                _seal(file)
            return
        except Stopped:
            return
        except NoMirrorLeft as error:
            raise DataError(_failure(file, error.reasons)) from None
        finally:
            lock.release()


def _tidy(target: Path) -> None:
    """Remove what was fetched of a file that has come in another way, unless a process is at work on it."""
    if has_partial(target):
        with suppress(OSError), _lock_of(target).acquire(timeout=0):  # also where the folder may only be read
            remove_partial(target)


def _lock_of(target: Path) -> FileLock:
    return FileLock(target.with_name(f".{target.name}.lock"))


def _failure(file: RemoteFile, reasons: Mapping[str, str]) -> str:
    if not file.urls:
        return f"{file.target} is not there or not right, and has no address; fetch it by hand and put it there."
    told = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    return (
        f"{file.target} could not be fetched: {told}. Try the same command again later, or fetch the file by hand and "
        "put it there."
    )


def _missing_bytes(files: Sequence[RemoteFile]) -> dict[Path, int]:
    """Return how many bytes of each target have still to come; 0 where nobody says how large it is."""
    unknown = [file for file in files if file.size is None]
    asked = dict(zip((file.target for file in unknown), remote_sizes(unknown) if unknown else [], strict=True))
    sizes = {file.target: file.size or asked.get(file.target) or 0 for file in files}
    return {target: max(0, size - present_bytes(target)) for target, size in sizes.items()}


def _check_space(missing: Mapping[Path, int]) -> None:
    """Refuse what does not fit, before the first byte; files on several disks are counted apart."""
    needs: dict[int, tuple[Path, int]] = {}
    for target, count in missing.items():
        folder = next(parent for parent in target.absolute().parents if parent.is_dir())
        disk = folder.stat().st_dev
        needs[disk] = folder, needs.get(disk, (folder, 0))[1] + count
    for folder, count in needs.values():
        free = shutil.disk_usage(folder).free
        if count > free:
            raise DataError(
                f"{folder} has {tqdm.format_sizeof(free)}B free, and {tqdm.format_sizeof(count)}B are still to be "
                "fetched; free some space, or choose a folder on another disk."
            )


def _seal(file: RemoteFile) -> None:
    """Remember that the target's checksum is right for as long as the file is not changed."""
    if file.checksum is not None:
        write_text(_seal_of(file.target), json.dumps(_facts(file.target, file.checksum)) + "\n")


def _seal_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.verified")


def _facts(target: Path, checksum: str) -> dict[str, str | int]:
    facts = target.stat()
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "checksum": checksum.lower()}


class _Bar:
    """One bar over all bytes, with the names of the files that are under way."""

    def __init__(self, total: int):
        self._bar: tqdm[Any] = progress(total, "Downloading", "B")
        self._lock = threading.Lock()
        self._names: list[str] = []

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        """Count bytes that have come, or that were dropped (below 0) and have to come again."""
        with self._lock:
            if count < 0:
                self._bar.total -= count
            else:
                self._bar.update(count)

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Show a file's name while it is under way."""
        with self._lock:
            self._names.append(name)
            self._bar.set_postfix_str(", ".join(self._names), refresh=False)
        try:
            yield
        finally:
            with self._lock:
                self._names.remove(name)
                self._bar.set_postfix_str(", ".join(self._names), refresh=False)
