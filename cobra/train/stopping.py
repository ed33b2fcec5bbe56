"""When a run is asked to stop before its last step: by a signal, or because its time is over."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cobra.errors import CTRL_C, STOPPED_EARLY

log = logging.getLogger(__name__)

_SECONDS_BETWEEN = 2.0  # launchers often pass a signal on that the terminal has sent as well


class StopRequest:
    """What this process has been asked for; the trainer looks once a step, and asks the other ranks."""

    def __init__(self, max_minutes: float | None) -> None:
        """Start the clock."""
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0: go on | 75: stop, and be started again | 130: Ctrl-C."""
        if self.signal is not None:
            return CTRL_C if self.signal == signal.SIGINT else STOPPED_EARLY
        return STOPPED_EARLY if self.deadline is not None and time.monotonic() >= self.deadline else 0


@contextmanager
def stop_signals(request: StopRequest) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGUSR1 in `request`; another one after two seconds acts as usual, at once."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        numbers.append(signal.SIGUSR1)
    first: list[float] = []

    def receive(number: int, _frame: object) -> None:
        now = time.monotonic()
        if not first:
            log.info("Stopping after this step; Ctrl-C once more, in two seconds or later, stops at once.")
            first.append(now)
            request.signal = number
        elif now - first[0] > _SECONDS_BETWEEN:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in before:
            signal.signal(number, receive)
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
