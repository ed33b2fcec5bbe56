"""One file from one mirror, over one or several connections."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from cobra.data.prepare.partial import Partial, Range
from cobra.data.prepare.sources import Answer, Interrupted, Refused, Sources

ATTEMPTS = 6  # of a connection without a byte on any, until a mirror is left for the next
SEGMENT = 64 * 2**20  # bytes asked for at once where several connections share a file

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between attempts
_SAVE_EVERY = 2.0  # seconds: what a killed process may lose
_HASH_AT_ONCE = 64 * 2**20  # bytes between two looks at the connections


class StartOver(Exception):
    """The bytes that are here cannot be joined with what this mirror sends."""


class IgnoresRanges(StartOver):
    """The mirror sends the whole file when asked for a part."""


class Stopped(Exception):
    """The process is ending."""


class Transfer:
    """Brings what a partial file lacks from one address.

    Args:
        part: the file; bytes that have arrived stay in it, whatever happens.
        connections: how many to open at most.
        stop: set from outside to end early.
    """

    def __init__(self, url: str, part: Partial, sources: Sources, *, connections: int, stop: threading.Event):
        self._url, self._part, self._sources = url, part, sources
        self._connections, self._stop = connections, stop
        self._lock = threading.Lock()
        self._claimed: dict[int, Range] = {}  # by thread
        self._failures: Counter[int] = Counter()  # by thread, since the last byte of any
        self._futures: list[Future[None]] = []
        self._refusal: Refused | None = None  # of the connection that ended last of those refused
        self._over = False

    def run(self) -> None:
        """Return when every byte is here.

        Raises:
            Refused: this mirror does not give it; the message says why.
            StartOver: the bytes here must be dropped, or the rest be brought from another mirror.
            Stopped: `stop` was set.
        """
        self._part.trim()
        saved = time.monotonic()
        with ThreadPoolExecutor(self._connections) as self._pool:
            with self._lock:  # it may have its answer before it is in the list, and would add another
                self._futures.append(self._pool.submit(self._connection))
            try:
                while True:
                    behind = self._part.hash_some(_HASH_AT_ONCE)
                    done, pending = wait(self._futures, 0 if behind else 0.1, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    finished = not behind and not pending and len(done) == len(self._futures)
                    if self._stop.is_set() or (finished and self._part.gap() is None):
                        break
                    if finished:
                        self._go_on_alone()
                    if time.monotonic() - saved > _SAVE_EVERY:
                        self._part.save()
                        saved = time.monotonic()
            finally:
                self._over = True  # for the other connections
        self._part.save()
        if self._stop.is_set():
            raise Stopped

    def _connection(self) -> None:
        """What each thread does. Being refused ends it alone: many servers limit how many connections one may have."""
        try:
            self._work()
        except Refused as error:
            self._refusal = error

    def _go_on_alone(self) -> None:
        """Once every connection has been refused: try with one, if it was not one already."""
        if len(self._futures) == 1 and self._refusal is not None:
            raise self._refusal
        self._connections = 1
        with self._lock:
            self._futures = [self._pool.submit(self._connection)]

    def _work(self) -> None:
        """Bring the next range that nobody else is bringing, until there is none."""
        while not self._ending() and (wanted := self._claim()) is not None:
            try:
                self._fetch(*wanted)
            except Interrupted as error:
                self._wait_after(error)
            finally:
                with self._lock:
                    del self._claimed[threading.get_ident()]

    def _ending(self) -> bool:
        return self._over or self._stop.is_set()

    def _claim(self) -> Range | None:
        with self._lock:
            gap = self._part.gap(self._claimed.values())
            if gap is None:
                return None
            start, stop = gap
            if stop < 0:  # not known yet; the answer will tell
                stop = start + SEGMENT
            elif self._connections > 1:
                stop = min(start + SEGMENT, stop)
            self._claimed[threading.get_ident()] = start, stop
            return start, stop

    def _fetch(self, start: int, stop: int) -> None:
        with self._sources.open(self._url, start, stop, self._part.validators.get(self._url)) as answer:
            self._examine(answer, start)
            self._add_connections(answer)
            end = answer.total if answer.whole else min(stop, answer.total or 0)
            position = self._copy(answer, end)
            if self._ending():
                return
            expected = self._part.total if end is None else end
            if expected is None:
                self._part.total = position
            elif position < expected:
                raise Interrupted(f"the connection ended {expected - position} bytes early")
            elif position > expected:
                raise StartOver(f"the file there has {position} bytes, not {expected}")

    def _copy(self, answer: Answer, end: int | None) -> int:
        """Write what arrives up to `end` and note it at once; return the position after the last byte."""
        position = answer.start
        with self._part.path.open("r+b", buffering=0) as file:  # unbuffered: what is noted has been written
            file.seek(position)
            while (end is None or position < end) and not self._ending():
                block = memoryview(answer.read())[: None if end is None else end - position]
                if not block:
                    break
                written = file.write(block)
                while written < len(block):
                    written += file.write(block[written:])
                self._part.add(position, position + written)
                position += written
                if not answer.whole:  # a whole file that breaks off has to begin again: no progress
                    self._failures.clear()
        return position

    def _examine(self, answer: Answer, start: int) -> None:
        """Refuse what does not fit with what is known of the file or here already."""
        part = self._part
        with self._lock:
            known = part.validators.get(self._url)
            if known is not None and known != answer.validator:
                raise StartOver("the file has changed on the server")
            if answer.whole and (start or part.present):
                raise IgnoresRanges("it sends the whole file when asked for the rest")
            if answer.start != start:
                raise Refused("it sends other bytes than those asked for")
            if answer.total is not None and part.total not in (None, answer.total):
                if part.size is not None:
                    raise Refused(f"the file there has {answer.total} bytes, not {part.size}")
                raise StartOver(f"the file there has {answer.total} bytes, not {part.total}")
            if answer.total is None and not answer.ends_itself and not part.can_be_checked:
                raise Refused("it says neither how large the file is nor where it ends")
            part.total = answer.total if part.total is None else part.total
            part.sources.add(self._url)
            if answer.validator is not None:
                part.validators[self._url] = answer.validator

    def _add_connections(self, answer: Answer) -> None:
        """After the first answer: more connections, where the server gives ranges and the file is worth it."""
        if answer.whole or answer.total is None:
            return
        with self._lock:
            useful = -(-(answer.total - self._part.present) // SEGMENT)
            while len(self._futures) < min(self._connections, useful):
                self._futures.append(self._pool.submit(self._connection))

    def _wait_after(self, error: Interrupted) -> None:
        with self._lock:
            self._failures[threading.get_ident()] += 1
            failures = self._failures[threading.get_ident()]
        if failures >= ATTEMPTS:
            raise Refused(f"{error} ({failures} attempts)") from None
        pause = max(error.wait, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))
        deadline = time.monotonic() + pause
        while not self._over and (left := deadline - time.monotonic()) > 0:
            if self._stop.wait(min(left, 0.2)):
                return
