"""One file from the first of its mirrors that gives it right."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from cobra.data.prepare.partial import Partial
from cobra.data.prepare.sources import Refused, Sources
from cobra.data.prepare.transfer import IgnoresRanges, StartOver, Transfer

log = logging.getLogger(__name__)

_MAX_RESTARTS = 5  # of a file from one mirror


class NoMirrorLeft(Exception):
    """No mirror gave the file.

    Attributes:
        reasons: by address.
    """

    def __init__(self, reasons: Mapping[str, str]):
        super().__init__(dict(reasons))
        self.reasons = reasons


def fetch(urls: Sequence[str], part: Partial, sources: Sources, *, connections: int, stop: threading.Event) -> None:
    """Complete a partial file, checksum and all.

    Args:
        urls: mirrors in order of preference.
        part: what is here of it; what has come stays in it, whatever happens.
        connections: how many to open at most.
        stop: set from outside to end early.

    Raises:
        NoMirrorLeft: none gave it.
        Stopped: `stop` was set.
    """
    mirrors = deque([url for url in urls if url not in part.bad] or urls)  # all bad: one may have been mended
    reasons = {url: f"its content was wrong before ({found})" for url, found in part.bad.items()}
    restarts = dict.fromkeys(urls, 0)
    while mirrors:
        url = mirrors[0]
        if part.sources - {url} and (part.one_source or part.checksum is None):
            part.drop()  # bytes of several mirrors would not be known to fit together
        try:
            Transfer(url, part, sources, connections=connections, stop=stop).run()
        except Refused as error:
            reasons[url] = str(error)
            mirrors.popleft()
            continue
        except StartOver as error:
            restarts[url] += 1
            if restarts[url] > _MAX_RESTARTS:
                reasons[url] = f"{error} ({restarts[url]} times)"
                mirrors.popleft()
            elif isinstance(error, IgnoresRanges) and restarts[url] == 1 and len(mirrors) > 1:
                mirrors.rotate(-1)  # the others can go on from here
            else:
                part.drop()
            continue
        found = part.wrong_checksum()
        if found is None:
            return
        if len(part.sources) > 1:
            part.one_source = True  # whose bytes were wrong cannot be told; the next time it can
        else:
            reasons[url] = f"its content is wrong ({found})"
            part.bad[url] = found
            log.warning("%s delivers another content than expected (%s)", url, found)
            mirrors.popleft()
        part.drop()
    raise NoMirrorLeft(reasons)
