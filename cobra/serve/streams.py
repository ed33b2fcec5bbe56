"""Between the worker's updates and a client's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cobra.serve.errors import ApiError
from cobra.serve.worker import Update


class Mailbox:
    """What has come for a request and was not taken yet. All of it is taken at once: a slow reader gets fewer, longer
    pieces."""

    def __init__(self) -> None:
        self._items: list[Update | ApiError] = []
        self._has_some = asyncio.Event()

    def put(self, item: Update | ApiError) -> None:
        """Add something; in the event loop's thread."""
        self._items.append(item)
        self._has_some.set()

    async def take(self) -> list[Update | ApiError]:
        """Wait until there is something, and return all."""
        await self._has_some.wait()
        self._has_some.clear()
        items, self._items = self._items, []
        return items


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: the events.
        seconds: after which the connection is given up; the events have ended by then, unless the client keeps it open
            without reading: what it left unread is freed with its connection, which is not in our hands.
        on_end: called when the stream is over, whether or not it was ever read, or the client has gone.
    """

    def __init__(self, events: AsyncIterator[bytes], *, seconds: float, on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: proxies must not collect
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._seconds = seconds
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all."""
        try:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
        finally:
            self._on_end()
