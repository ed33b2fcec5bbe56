"""An HTTP server for downloads that can be made to misbehave, and counts what it sends."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLOCK = 16 * 1024


@dataclass
class Mirror:
    """One server: what it serves, how it fails, what it has done."""

    files: dict[str, bytes]
    ranges: bool = True
    sized: bool = True  # False: the end of the connection is the end of the file
    etags: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # in each answer with content
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the next answers
    error_rate: float = 0.0  # of answers that are 500
    cuts: int = 0  # answers still to break off at a random byte
    bytes_per_second: float | None = None
    seed: int = 0
    address: str = ""
    sent: int = 0
    connections: int = 0
    most_connections: int = 0
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range

    def __post_init__(self) -> None:
        self.rng, self.lock = random.Random(self.seed), threading.Lock()

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mirror: Mirror

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * BLOCK)  # so that sent is nearly arrived

    def handle(self) -> None:
        with suppress(ConnectionError):  # the other side has gone, between two requests
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        mirror, name = self.mirror, self.path.lstrip("/")
        with mirror.lock:
            mirror.requests.append((name, self.headers["Range"]))
            status, headers = mirror.statuses.pop(0) if mirror.statuses else (0, {})
            if not status and mirror.rng.random() < mirror.error_rate:
                status = 500
        if not status and name not in mirror.files:
            status = 404
        if status:
            self.answer(status, {**headers, "Content-Length": "0"})
            return
        content, etag = mirror.files[name], mirror.etags.get(name)
        start, stop, status, headers = 0, len(content), 200, dict(mirror.headers)
        if etag is not None:
            headers["ETag"] = etag
        asked = self.headers["Range"] if self.headers["If-Range"] in (None, etag) else None
        if asked and mirror.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1)
            status = 206 if start < len(content) else 416
            headers["Content-Range"] = f"bytes {f'{start}-{stop - 1}' if status == 206 else '*'}/{len(content)}"
        body = memoryview(content)[start:stop] if status != 416 else memoryview(b"")
        self.answer(status, headers | ({"Content-Length": str(len(body))} if mirror.sized else {}))
        self.close_connection = not mirror.sized
        self.send(body)

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, body: memoryview) -> None:
        mirror = self.mirror
        with mirror.lock:
            cut = mirror.cuts > 0 and len(body) > 1
            mirror.cuts -= cut
            length = mirror.rng.randrange(len(body)) if cut else len(body)
            mirror.connections += 1
            mirror.most_connections = max(mirror.most_connections, mirror.connections)
        try:
            for i in range(0, length, BLOCK):
                block = body[i : min(length, i + BLOCK)]
                self.wfile.write(block)
                with mirror.lock:
                    mirror.sent += len(block)
                if mirror.bytes_per_second is not None:
                    time.sleep(len(block) / mirror.bytes_per_second)
        except OSError:  # the other side has gone
            cut = True
        finally:
            with mirror.lock:
                mirror.connections -= 1
        if cut:
            self.close_connection = True


@contextmanager
def serving(*mirrors: Mirror) -> Iterator[None]:
    """Serve each mirror at an address of its own."""
    servers: list[ThreadingHTTPServer] = []
    for mirror in mirrors:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"mirror": mirror}))
        mirror.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
