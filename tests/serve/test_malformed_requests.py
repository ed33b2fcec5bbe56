"""Generated requests that are wrong somewhere: each is answered with a 4xx, soon, and the server lives on."""

from __future__ import annotations

import copy
import json
import random
import re
import socket
import time
from typing import Any

from PIL import Image

from serve.conftest import Running, data_url
from serve.test_chat_completions import ASK, image_part, text, user

NUMBER = 300

GOOD: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        user(ASK, image_part(data_url(Image.new("RGB", (9, 9))))),
        {"role": "assistant", "content": "a"},
        user(ASK),
    ],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "n": 1,
    "seed": 1,
    "stop": ["x"],
    "stream": False,
}
# Wrong in every place, if they are not what stood there.
WRONG = [
    [[]],
    {"a": {}},
    -7.5,
    -(10**400),
    "\ud800",
    "\0",
    [None],
    {"role": "user"},
    float("nan"),
    float("-inf"),
    [["x"] * 50] * 50,
]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in places(child, (*path, key))]


def wrong_value(rng: random.Random) -> bytes:
    """A value of another kind somewhere, or a field that is missing or misspelt."""
    body = copy.deepcopy(GOOD)
    while True:
        *parents, last = rng.choice(places(body))
        parent = body
        for key in parents:
            parent = parent[key]
        takes_any_text = last in ("text", "content") or "stop" in (last, *parents)
        value = rng.choice(WRONG)
        if takes_any_text and isinstance(value, str):
            continue
        parent[last] = value
        return json.dumps(body).encode()


def wrong_name(rng: random.Random) -> bytes:
    body = copy.deepcopy(GOOD)
    name = rng.choice(["model", "messages"])
    if rng.random() < 0.7:
        body["".join(rng.choices("abcxyz\u00e9\0", k=9))] = 1
    else:
        del body[name]
    return json.dumps(body).encode()


def wrong_json(rng: random.Random) -> bytes:
    good = json.dumps(GOOD).encode()
    kind = rng.randrange(5)
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        return rng.randbytes(rng.randrange(2000))
    if kind == 2:
        return b"[" * rng.randrange(1, 200_000)
    if kind == 3:
        return rng.choice([b"", b"null", b"[]", b"1", b'"x"', b"{}", b"\xff\xfe{}", b"{}{}", b'{"model": "tiny",}'])
    strings = [found.span() for found in re.finditer(rb'"[^"]*"', good)]  # within them much is right
    place = rng.choice([at for at in range(len(good)) if not any(a < at < b for a, b in strings)])
    return good[:place] + rng.choice([b"\x80", b"\\", b"{", b"}", b'"']) + good[place:]


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
JSON = b"Content-Type: application/json\r\n"


def wrong_http(rng: random.Random) -> bytes:
    """A request that is wrong as HTTP, or not for this server."""
    body = json.dumps(GOOD).encode()
    length = f"Content-Length: {len(body)}\r\n".encode()
    return rng.choice(
        [
            POST + length + b"\r\n" + body,  # of no type
            POST + b"Content-Type: text/plain\r\n" + length + b"\r\n" + body,
            POST + JSON + b"Content-Length: -1\r\n\r\n",
            POST + JSON + b"Content-Length: 99999999999\r\n\r\n",
            POST + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n",
            b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /v1/models/%00%ff%0a HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /" + bytes(rng.choices(b"abc%/._", k=500)) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"nonsense\r\n\r\n",
            rng.randbytes(100).replace(b"\n", b" ") + b"\r\n\r\n",
            POST + b"X: y\r\n" * 20_000 + b"\r\n",
        ]
    )


def send(running: Running, content: bytes) -> tuple[bytes, float]:
    """Return the beginning of the answer and the seconds until it came."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(content)
        answer = connection.recv(4000)
        while b"connection: close" in answer.lower() and (more := connection.recv(4000)):
            answer += more
        return answer, time.monotonic() - started


def test_request_that_is_made_wrong_was_right(running: Running) -> None:
    body = json.dumps(GOOD).encode()
    answer, _ = send(running, POST + JSON + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert answer.startswith(b"HTTP/1.1 200"), answer


def test_generated_malformed_requests_are_refused(running: Running, client, vlm) -> None:
    rng = random.Random(0)
    slowest, kinds = 0.0, {wrong_value: 0, wrong_name: 0, wrong_json: 0, wrong_http: 0}
    for number in range(NUMBER):
        kind = rng.choice(list(kinds))
        kinds[kind] += 1
        content = kind(rng)
        if kind is not wrong_http:
            content = POST + JSON + f"Content-Length: {len(content)}\r\n\r\n".encode() + content
        answer, seconds = send(running, content)
        if seconds > 1:  # the machine may have been busy with something else
            answer, seconds = send(running, content)
        assert answer[:12].startswith(b"HTTP/1.1 4"), (number, kind.__name__, content[:300], answer)
        if kind is not wrong_http:
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 600
        slowest = max(slowest, seconds)
    assert slowest < 1, "each within a second"
    assert min(kinds.values()) > NUMBER / 8
    assert text(client, user(ASK)) == vlm.generate(None, ASK, max_new_tokens=12)
    assert running.service.open_answers == 0
