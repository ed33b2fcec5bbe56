"""Fetching for strangers: what is refused, and that only checked addresses are connected to."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cobra.api import Cobra
from cobra.config import ServeConfig
from cobra.serve.errors import ApiError
from cobra.serve.fetch import NotFetched, fetch, is_public
from cobra.serve.images import ImageReader

Answer = Callable[[BaseHTTPRequestHandler], None]


def get(url: str, *, private: bool = False, max_bytes: int = 1000, timeout: float = 5.0) -> bytes:
    return asyncio.run(fetch(url, max_bytes=max_bytes, timeout=timeout, allow_private=private))


@pytest.fixture
def website() -> Iterator[dict[str, Answer]]:
    """Pages by path; `address` is where they are. Requests are noted in `seen`."""
    pages: dict[str, Any] = {"seen": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages["seen"].append((self.path, self.headers["Host"]))
            pages[self.path](self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    pages["address"] = f"http://127.0.0.1:{server.server_port}"
    yield pages
    server.shutdown()
    server.server_close()


def sends(content: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def resolver(monkeypatch: pytest.MonkeyPatch, **names: list[list[str]]) -> list[str]:
    """Let names stand for the addresses of their first, second ... look-up; return what was looked up."""
    asked: list[str] = []

    def look_up(host: str, port: int, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        name = host.partition(".")[0]
        answers = names.get(name, [[host]])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_content_arrives(website) -> None:
    website["/a%20b?c=d"] = sends(b"picture")
    assert get(f"{website['address']}/a b?c=d#part", private=True) == b"picture"
    assert website["seen"] == [("/a%20b?c=d", website["address"].removeprefix("http://"))]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.1",
        "fec0::1",
        "3fff::1",
        "64:ff9b:1::7f00:1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # clouds keep secrets there
        "100.64.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:a9fe:a9fe",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "2001:db8::1",
    ],
)
def test_private_addresses_are_refused(monkeypatch, address: str) -> None:
    assert not is_public(address)
    resolver(monkeypatch, innocent=[["93.184.215.14", address]])  # one of several is enough
    with pytest.raises(NotFetched, match="not public"):
        get("http://innocent.test/x.png")


def test_public_addresses_are_known() -> None:
    for address in ("93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::808:808"):
        assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_this_machine_is_refused_by_any_name(website, host: str) -> None:
    port = website["address"].rpartition(":")[2]
    with pytest.raises(NotFetched, match="not public"):
        get(f"http://{host}:{port}/x")
    assert website["seen"] == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "017700000001", "127.1"])
def test_other_spellings_of_an_address_are_refused(monkeypatch, website, host: str) -> None:
    """The system's resolver understands them; it is asked here, as a number needs no network."""
    real = socket.getaddrinfo.__closure__  # type: ignore[attr-defined]
    look_up = next(cell.cell_contents for cell in real if getattr(cell.cell_contents, "__name__", "") == "getaddrinfo")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(NotFetched, match=r"not public|not known"):
        get(f"http://{host}:{website['address'].rpartition(':')[2]}/x")
    assert website["seen"] == []


def test_names_are_looked_up_once_and_the_checked_address_is_connected_to(monkeypatch) -> None:
    """A name server that first gives a public address and then a private one gets nothing out of it."""
    asked = resolver(monkeypatch, rebound=[["93.184.215.14"], ["127.0.0.1"]])
    connected: list[Any] = []

    async def connect(host: str, port: int, **_: object) -> Any:
        connected.append((host, port))
        raise OSError(111, "refused")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(NotFetched, match="refused"):
        get("http://rebound.test:8080/x")
    assert asked == ["rebound.test"] and connected == [("93.184.215.14", 8080)]


def test_tls_checks_the_name_and_not_the_address(monkeypatch) -> None:
    resolver(monkeypatch, secure=[["93.184.215.14"]])
    connected: list[Any] = []

    async def connect(host: str, port: int, *, ssl: Any, server_hostname: str) -> Any:
        connected.append((host, port, ssl.check_hostname, server_hostname))
        raise OSError(111, "refused")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(NotFetched):
        get("https://secure.test/x")
    assert connected == [("93.184.215.14", 443, True, "secure.test")]


def test_redirections_are_followed_and_checked(website, monkeypatch) -> None:
    website["/first"] = sends(b"", 302, Location="/second")
    website["/second"] = sends(b"", 307, Location=f"{website['address']}/third")
    website["/third"] = sends(b"here")
    assert get(f"{website['address']}/first", private=True) == b"here"
    website["/loop"] = sends(b"", 301, Location="/loop")
    with pytest.raises(NotFetched, match="redirected more than 5 times"):
        get(f"{website['address']}/loop", private=True)
    website["/file"] = sends(b"", 302, Location="file:///etc/passwd")
    website["/broken"] = sends(b"", 302, Location="http://[")
    with pytest.raises(NotFetched, match="only http"):
        get(f"{website['address']}/file", private=True)
    with pytest.raises(NotFetched, match="redirected to what is not an address"):
        get(f"{website['address']}/broken", private=True)


def test_redirection_to_a_private_address_is_refused(website, monkeypatch) -> None:
    """Its first stop counts as public here, the second is an address of this machine by name."""
    resolver(monkeypatch, outside=[["127.0.0.1"]], inside=[["127.0.0.2"]])
    monkeypatch.setattr("cobra.serve.fetch.is_public", lambda address: address == "127.0.0.1")
    port = website["address"].rpartition(":")[2]
    website["/x"] = sends(b"", 302, Location=f"http://inside.test:{port}/secret")
    website["/secret"] = sends(b"secret")
    with pytest.raises(NotFetched, match="not public"):
        get(f"http://outside.test:{port}/x")
    assert website["seen"] == [("/x", f"outside.test:{port}")]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1/x",
        "//127.0.0.1/x",
        "http://",
        "http:///x",
        "http://[::1/x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:port/x",
        "http://user:word@127.0.0.1/x",
        "http://127.0.0.1 /x",
        "http://a\u2024b/\ud800",
        "x" * 10_000,
        "",
    ],
)
def test_what_is_no_address_is_refused(url: str, website) -> None:
    with pytest.raises(NotFetched):
        get(url, private=True)


def test_line_breaks_cannot_add_headers(website) -> None:
    website["/aX-Header:%201"] = sends(b"still one header")
    assert get(f"{website['address']}/a\r\nX-Header: 1", private=True) == b"still one header"


def test_proxies_of_the_environment_are_not_used(website, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    website["/x"] = sends(b"direct")
    assert get(f"{website['address']}/x", private=True) == b"direct"


def test_sizes_are_limited(website) -> None:
    website["/said"] = sends(b"", Content_Length="1001")
    website["/unsaid"] = sends(b"x" * 1001)
    website["/fits"] = sends(b"x" * 1000)
    website["/zipped"] = sends(b"x", Content_Encoding="gzip")
    website["/gone"] = sends(b"x", 404)
    website["/cut"] = sends(b"x", Content_Length="100")
    for path, reason in {
        "/said": "larger than 1000",
        "/unsaid": "larger than 1000",
        "/zipped": "compressed",
        "/gone": "status 404",
        "/cut": "HTTP|early",
    }.items():
        with pytest.raises(NotFetched, match=reason):
            get(website["address"] + path, private=True)
    assert len(get(f"{website['address']}/fits", private=True)) == 1000


def test_servers_that_dawdle_are_left_in_time(website) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        """A byte now and then, which no limit on a single read would notice."""
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):  # nobody is there any more
            for _ in range(50):
                handler.wfile.write(b"x")
                time.sleep(0.1)

    website["/drip"] = drip
    with pytest.raises(NotFetched, match=r"within 0\.3 s"):
        get(f"{website['address']}/drip", private=True, timeout=0.3)


def test_few_files_are_fetched_at_once(vlm: Cobra, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in memory while they arrive."""
    at_once: list[int] = [0]

    async def slow(url: str, **_: object) -> bytes:
        at_once.append(at_once[-1] + 1)
        await asyncio.sleep(0.01)
        at_once.append(at_once[-1] - 1)
        raise NotFetched("it is not there")

    async def read_all(count: int) -> list[object]:
        reader = ImageReader(vlm, ServeConfig(load="x"))
        urls = [f"http://a.test/{number}" for number in range(count)]
        try:
            return await asyncio.gather(*(reader.read(url, lambda _: None) for url in urls), return_exceptions=True)
        finally:
            reader.close()

    monkeypatch.setattr("cobra.serve.images.fetch", slow)
    found = asyncio.run(read_all(20))
    assert [type(one) for one in found] == [ApiError] * 20  # one that fails gives its place to the next
    assert max(at_once) == 8 and at_once[-1] == 0
