"""Fetches small files for strangers: from public addresses only, within limits of size and time.

Names are resolved here and the connection goes to the address that was checked, so that a name server cannot give
another one in between. Every redirection is checked in the same way. Proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

MAX_REDIRECTS = 5

_REDIRECTIONS = (301, 302, 303, 307, 308)
_READ_SIZE = 2**16  # bytes
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Which `ipaddress` takes for public, in some versions: site-local addresses, those of documentation, local NAT64.
_NOT_PUBLIC = [ipaddress.ip_network(block) for block in ("fec0::/10", "3fff::/20", "64:ff9b:1::/48")]
_HOST = re.compile(r"[A-Za-z0-9._:-]+")
_UNRESERVED = "!#$%&'()*+,/:;=?@[]~"  # characters of an address that stay as they are


class NotFetched(Exception):
    """The reason why there is no file."""


async def fetch(
    url: str, *, max_bytes: int, timeout: float, allow_private: bool, count: Callable[[int], None] = lambda _: None
) -> bytes:
    """Return the content behind an http(s) address.

    Args:
        url: the address.
        max_bytes: of the content; a longer one is refused.
        timeout: seconds for everything: names, connections, redirections, content.
        allow_private: whether addresses that are not public will do.
        count: told the number of bytes of the content as they arrive; what it raises ends the fetching.

    Raises:
        NotFetched: there is none, or this server will not fetch it.
    """
    try:
        return await asyncio.wait_for(_follow(url, max_bytes, allow_private, count), timeout)
    except asyncio.TimeoutError:
        raise NotFetched(f"it does not arrive within {timeout:g} s") from None
    except ssl.SSLError as error:
        raise NotFetched(f"the encrypted connection fails ({error.reason or 'TLS'})") from None
    except h11.RemoteProtocolError:
        raise NotFetched("the server there does not answer in HTTP") from None
    except OSError as error:
        raise NotFetched(error.strerror or "the connection fails") from None


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and so do IPv4 addresses that it may stand for."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [found for found in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())) if found is not None]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(ip in block for block in _NOT_PUBLIC):
            return False
    if inner:
        return all(is_public(str(found)) for found in inner)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def _follow(url: str, max_bytes: int, allow_private: bool, count: Callable[[int], None]) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        addresses = await _resolve(parts, allow_private)
        reader, writer = await _connect(parts, addresses)
        try:
            found = await _get(parts, reader, writer, max_bytes, count)
        finally:
            writer.transport.abort()  # at once: whatever is still to come is not wanted
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found.location)
        except ValueError:
            raise NotFetched("it is redirected to what is not an address") from None
    raise NotFetched(f"it is redirected more than {MAX_REDIRECTS} times")


def _split(url: str) -> SplitResult:
    """Take an address apart, in ASCII: the host as IDNA, the rest percent-encoded."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = "" if parts.port is None else f":{parts.port}"
        path, query = quote(parts.path, safe=_UNRESERVED), quote(parts.query, safe=_UNRESERVED)
    except (ValueError, UnicodeError):
        raise NotFetched("this is not an address") from None
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host):
        raise NotFetched("only http and https addresses are fetched")
    if parts.username is not None or parts.password is not None:
        raise NotFetched("addresses with user names are not fetched")
    return SplitResult(parts.scheme, f"[{host}]{port}" if ":" in host else f"{host}{port}", path or "/", query, "")


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


async def _resolve(parts: SplitResult, allow_private: bool) -> list[str]:
    """Return the IP addresses of a host; NotFetched when any of them is private."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise NotFetched("its host is not known") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses or (not allow_private and not all(map(is_public, addresses))):
        raise NotFetched("its address is not public; send the image itself, as a data: URL")
    return addresses


async def _connect(parts: SplitResult, addresses: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls = _certificates() if parts.scheme == "https" else None
    name = parts.hostname if tls else None
    for address in addresses[:-1]:
        with suppress(OSError):
            return await asyncio.open_connection(address, _port(parts), ssl=tls, server_hostname=name)
    return await asyncio.open_connection(addresses[-1], _port(parts), ssl=tls, server_hostname=name)


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Redirection:
    def __init__(self, location: str):
        self.location = location


async def _get(
    parts: SplitResult,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    max_bytes: int,
    count: Callable[[int], None],
) -> bytes | _Redirection:
    connection = h11.Connection(h11.CLIENT)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    headers = [
        ("Host", parts.netloc),
        ("User-Agent", "cobra"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    try:
        writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
    except h11.LocalProtocolError:
        raise NotFetched("this is not an address") from None
    content = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_SIZE))
        elif isinstance(event, h11.Response):
            received = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
            if event.status_code in _REDIRECTIONS and "location" in received:
                return _Redirection(received["location"])
            _check(event.status_code, received, max_bytes)
        elif isinstance(event, h11.Data):
            count(len(event.data))
            content += event.data
            if len(content) > max_bytes:
                raise _too_large(max_bytes)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(content)
        elif isinstance(event, h11.ConnectionClosed):
            raise NotFetched("the connection ends early")


def _check(status: int, headers: dict[str, str], max_bytes: int) -> None:
    if status != 200:
        raise NotFetched(f"the server there answers with status {status}")
    if headers.get("content-encoding", "identity") != "identity":
        raise NotFetched("the server there sends it compressed, which was not asked for")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> NotFetched:
    return NotFetched(f"it is larger than {max_bytes} bytes")
