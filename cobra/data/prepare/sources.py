"""Where bytes come from: one range of a file over http(s) or from this machine, and what the answer says about it."""

from __future__ import annotations

import email.utils
import itertools
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

SCHEMES = ("http", "https", "file")

_TIMEOUTS = (10, 30)  # seconds: to connect, and without a byte
_READ_SIZE = 2**20  # bytes
_MAX_WAIT = 120  # seconds; a server that asks for more is left for the next mirror
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_WEB_PAGES = (".html", ".htm")
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b", re.IGNORECASE)


class Refused(Exception):
    """This address will not give the file, however often it is asked."""


class Interrupted(Exception):
    """Another try may go better.

    Attributes:
        wait: seconds that the server asks to wait first.
    """

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A file, or a range of it, as it begins to arrive; use it as a context manager.

    Attributes:
        start: position of the first byte that arrives.
        total: bytes of the whole file, None: unknown.
        whole: the file from its first byte to its last, although a range was asked for.
        ends_itself: the end of the bytes cannot be mistaken for a lost connection.
        validator: changes when the file does; None: there is none.
        read: returns some more bytes; b"" at the end.
    """

    start: int
    total: int | None
    whole: bool
    ends_itself: bool
    validator: str | None
    read: Callable[[], bytes]
    close: Callable[[], None]

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sources:
    """Opens addresses; may be used from several threads, keeps connections open between requests."""

    def __init__(self, connections: int):
        self._session = requests.Session()
        self._session.headers.update({"User-Agent": "cobra", "Accept-Encoding": "identity"})
        for scheme in ("http://", "https://"):  # so redirections lead nowhere else
            self._session.mount(scheme, HTTPAdapter(pool_connections=connections, pool_maxsize=connections))

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def open(self, url: str, start: int, stop: int, validator: str | None = None) -> Answer:
        """Ask for the bytes from `start` up to `stop`, of the file that had this validator.

        Raises:
            Refused: it is not there, or something else is, such as a web page.
            Interrupted: the server does not answer or is busy.
        """
        if urllib.parse.urlsplit(url).scheme == "file":
            return _open_local(url, start)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if validator is not None and not validator.startswith("W/"):  # a weak one is not allowed there
            headers["If-Range"] = validator
        try:
            response = self._session.get(url, headers=headers, stream=True, timeout=_TIMEOUTS)
        except (requests.exceptions.SSLError, requests.TooManyRedirects, ValueError) as error:  # also a bad address
            raise Refused(_brief(error)) from None
        except requests.RequestException as error:
            raise Interrupted(_brief(error)) from None
        try:
            return _answer(response, url, start)
        except BaseException:
            response.close()
            raise


def _answer(response: requests.Response, url: str, start: int) -> Answer:
    status, headers = response.status_code, response.headers
    if status in _TRY_AGAIN:
        wait = _retry_after(headers.get("Retry-After"))
        if wait > _MAX_WAIT:
            raise Refused(f"status {status}, to be asked again in {wait:.0f} s")
        raise Interrupted(f"status {status} {response.reason}", wait)
    if status not in (200, 206, 416):
        raise Refused(f"status {status} {response.reason}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"it sends the file in another encoding ({headers['Content-Encoding']})")

    def receive() -> bytes:
        try:  # what there is, not a full block: nothing that came is lost when the connection is
            return response.raw.read1(_READ_SIZE, decode_content=False)
        except (HTTPError, OSError) as error:
            raise Interrupted(f"the connection broke off ({_brief(error)})") from None

    if status == 200:
        length = headers.get("Content-Length")
        first, total = 0, int(length) if length is not None and length.isdecimal() else None
    else:
        first, total = _content_range(headers.get("Content-Range", ""), start)
    content = iter(receive if status != 416 else bytes, b"")  # past the end there is nothing to read
    head = next(content, b"") if first == 0 else b""
    wanted = urllib.parse.urlsplit(url).path.lower().endswith(_WEB_PAGES)
    if not wanted and _is_web_page(headers.get("Content-Type", ""), head):
        raise Refused("a web page instead of the file (a login, a quota or a notice: open the address in a browser)")
    content = itertools.chain([head] if head else [], content)
    return Answer(
        start=first,
        total=total,
        whole=status == 200,
        ends_itself=total is not None or "chunked" in headers.get("Transfer-Encoding", ""),
        validator=headers.get("ETag") or headers.get("Last-Modified"),
        read=lambda: next(content, b""),
        close=response.close,
    )


def _is_web_page(content_type: str, head: bytes) -> bool:
    """Whether an answer is one by its type or, as some servers call theirs something else, by its first bytes."""
    return content_type.lower().startswith(("text/html", "application/xhtml")) or _HTML.match(head) is not None


def _content_range(text: str, start: int) -> tuple[int, int]:
    """Return the first byte's position and the file's size from a Content-Range."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", text.strip())
    if match is None:
        raise Refused(f"Content-Range {text!r} does not say where the bytes belong")
    return int(match[1] or start), int(match[2])


def _retry_after(text: str | None) -> float:
    """Return the seconds of a Retry-After: a number, or a date."""
    if text is None:
        return 0
    if text.strip().isdecimal():
        return int(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0


def _open_local(url: str, start: int) -> Answer:
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    try:
        file = path.open("rb")
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    file.seek(start)
    facts = path.stat()
    return Answer(
        start=start,
        total=facts.st_size,
        whole=False,
        ends_itself=True,
        validator=f"{facts.st_size}-{facts.st_mtime_ns}",
        read=lambda: file.read(_READ_SIZE),
        close=file.close,
    )


def _brief(error: Exception) -> str:
    """Return the innermost reason of a chain of network errors, on one line."""
    inner: object = error
    while True:
        deeper = getattr(inner, "reason", None) or next(
            (value for value in getattr(inner, "args", ()) if isinstance(value, Exception)), None
        )
        if not isinstance(deeper, Exception):
            break
        inner = deeper
    text = " ".join(str(inner).split()) or type(inner).__name__
    return text.rpartition("): ")[2][:200]
