"""The text of an answer while its tokens arrive: what is certain so far, and whether a stop string has ended it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cobra.errors import ConfigError

CONTEXT = 16  # tokens that are decoded again with each new one
AGREEMENT = 4  # characters, so four bytes at least; a window is shortened only if they are left and stay the same


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the strings that end an answer.

    Raises:
        ConfigError: one is empty, or not a string.
    """
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(item, str) and item for item in stops):
        raise ConfigError(
            f"stop={stop!r} must be a string that is not empty, or a list of such strings; use [] for none."
        )
    return tuple(stops)


class AnswerText:
    """Text of a growing answer, without white space around it and up to the first stop string.

    Tokens are decoded in a window over the last ones, so a token costs the same at the end of a long answer. In a
    byte-level vocabulary a text is the UTF-8 of its tokens' joined bytes, with U+FFFD for what is not valid; so only
    a character that is not complete yet can still change, and it shows as one U+FFFD at the end, which waits. A
    window may begin inside a character. That spoils its first three bytes at most, whose text is long taken: windows
    are compared, and aligned, at their ends.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """Begin an answer; `decode` turns token ids to text."""
        self.is_over = False  # a stop string has appeared
        self._decode = decode
        self._stops = stops
        self._window: list[int] = []
        self._num_taken = 0  # characters of the window's text that are in `_held` or beyond
        self._held = ""  # might be the beginning of a stop string
        self._ready = ""
        self._is_blank = True  # nothing but white space so far

    def add(self, token: int) -> None:
        """Append a token."""
        self._window.append(token)
        text = self._decode(self._window)
        self._extend(text[self._num_taken :].removesuffix("\N{REPLACEMENT CHARACTER}"), text)
        if len(self._window) > 2 * CONTEXT:
            rest = self._decode(self._window[-CONTEXT:])
            # Tokens without text can make the rest too short to be in step with the whole.
            if len(rest) >= AGREEMENT and text.endswith(rest[-AGREEMENT:]):
                del self._window[:-CONTEXT]
                self._num_taken += len(rest) - len(text)

    def take(self) -> str:
        """Return the certain text that has not been taken yet; white space waits for what follows it."""
        text = self._ready.lstrip() if self._is_blank else self._ready
        taken = text.rstrip()
        self._ready = text[len(taken) :]
        self._is_blank = self._is_blank and not taken
        return taken

    def finish(self) -> str:
        """Return all text that has not been taken yet; the answer ends here."""
        if not self.is_over:
            text = self._decode(self._window)
            self._extend(text[self._num_taken :], text)
        if not self.is_over:
            self._ready += self._held
        self._held = ""
        return self.take()

    def _extend(self, new: str, text: str) -> None:
        """Append certain characters, the next ones of the window's `text`; look for stop strings."""
        self._num_taken += len(new)
        self._held += new
        found = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        self.is_over = bool(found)
        cut = min(found) if found else len(self._held) - self._num_undecided()
        self._ready += self._held[:cut]
        self._held = self._held[cut:]

    def _num_undecided(self) -> int:
        """Count the last characters that a stop string might begin with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
