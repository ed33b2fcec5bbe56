"""What a server does when too much is asked of it, when clients leave, and when it is stopped."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import logging
import socket
import struct
import threading
import time
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from cobra.api import Cobra
from cobra.serve.schema import ChatRequest
from cobra.serve.streams import EventStream
from serve.conftest import Running, data_url
from serve.test_chat_completions import ASK, ask, image_part, text, user

LONG = 4000  # tokens: many seconds


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it does not happen")


def begun(client: openai.OpenAI, **options: Any) -> Any:
    """A stream whose answer is being generated."""
    stream = ask(client, user(ASK), stream=True, **{"max_tokens": LONG} | options)
    assert next(chunk for chunk in stream if chunk.choices[0].delta.content)
    return stream


def is_idle(running: Running) -> bool:
    return running.service.open_answers == 0 and len(running.service.worker._scheduler) == 0


def post(running: Running, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{running.address}/v1/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_full_queue_is_told(serve) -> None:
    with serve(max_rows=1, max_waiting=1, max_choices=1) as running:
        client = running.client()
        first = begun(client)
        second = ask(client, user(ASK), stream=True, max_tokens=2)  # waits, and holds the last place
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, user(ASK))
        assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
        first.close()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in second)  # its turn came
        wait_until(lambda: is_idle(running))
        assert text(client, user(ASK))


@pytest.mark.parametrize("streams", [True, False])
def test_client_that_leaves_frees_its_row(running: Running, streams: bool) -> None:
    body = {"model": "tiny", "messages": [user(ASK)], "max_tokens": LONG, "n": 2, "stream": streams}
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2]))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        wait_until(lambda: len(running.service.worker._scheduler) == 2)
    wait_until(lambda: is_idle(running))
    assert running.service.worker._answers == {} and running.service._mailboxes == {}


def test_client_that_never_reads_is_given_up() -> None:
    async def forever(*_: object) -> Any:
        await asyncio.Event().wait()

    async def events() -> AsyncIterator[bytes]:
        yield b"data: 1"

    ended: list[bool] = []
    stream = EventStream(events(), seconds=0.05, on_end=lambda: ended.append(True))
    asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, forever, forever))
    assert ended == [True]


def test_slow_answer_ends_with_an_error(serve) -> None:
    with serve(timeout=0.3) as running:
        client = running.client()
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, user(ASK), max_tokens=LONG)
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        with pytest.raises(openai.APIError, match=r"not complete after 0\.3 s"):
            list(ask(client, user(ASK), max_tokens=LONG, stream=True))
        wait_until(lambda: is_idle(running))


@pytest.mark.parametrize("drips", [False, True])
def test_body_that_does_not_arrive_is_refused(serve, drips: bool) -> None:
    """Neither does one that comes a byte now and then, for ever within any limit on a single read."""
    with serve(body_timeout=0.3) as running:
        port = int(running.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            for _ in range(20 if drips else 0):  # 0.4 s
                time.sleep(0.02)
                with suppress(ConnectionError):  # it may have been refused already
                    connection.send(b" ")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert running.service.open_answers == 0


def test_broken_model_is_an_error_and_not_the_end(serve, vlm: Cobra, monkeypatch) -> None:
    with serve() as running:
        client = running.client()
        norm = vlm.model.llm.backbone.norm_f
        with monkeypatch.context() as patch:
            patch.setattr(norm, "forward", lambda hidden, residual: (hidden * torch.nan, residual))
            with pytest.raises(openai.InternalServerError, match="NaN"):
                ask(client, user(ASK), n=2)
        with monkeypatch.context() as patch:
            patch.setattr(norm, "forward", lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="the server's log"):
                ask(client, user(ASK))
            with pytest.raises(openai.APIError, match="the server's log"):
                list(ask(client, user(ASK, image_part(data_url(Image.new("RGB", (9, 9))))), stream=True))
        assert text(client, user(ASK)) == vlm.generate(None, ASK, max_new_tokens=12)


def test_order_that_fails_is_not_the_end(serve, vlm: Cobra, monkeypatch) -> None:
    with serve() as running:
        with monkeypatch.context() as patch:
            patch.setattr(running.service.worker._scheduler, "cancel", lambda _: 1 / 0)
            begun(running.client()).close()
            wait_until(lambda: is_idle(running))
        assert text(running.client(), user(ASK)) == vlm.generate(None, ASK, max_new_tokens=12)


def test_end_of_the_models_thread_is_told_and_ends_the_server(serve, monkeypatch) -> None:
    with serve() as running:
        client = running.client()
        stream = begun(client)
        monkeypatch.setattr(running.server, "on_tick", lambda _: asyncio.sleep(0, False))  # stays for the questions
        monkeypatch.setattr(running.service.worker, "_take_orders", lambda: 1 / 0)
        with pytest.raises(openai.APIError, match="The model has failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            text(client, user(ASK))
        assert caught.value.status_code == 503 and caught.value.code == "failed"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{running.address}/health", timeout=10)
        monkeypatch.undo()
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_slow_senders_take_no_places(serve) -> None:
    with serve(max_rows=1, max_waiting=1, max_choices=1, max_tokens=512) as running:
        port = int(running.address.rpartition(":")[2])
        with ExitStack() as stack:
            for _ in range(8):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                connection.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 100\r\n\r\n{"
                )
            wait_until(lambda: running.service._num_bodies == 8)
            assert text(running.client(), user(ASK))
        wait_until(lambda: running.service._num_bodies == 0)
        assert running.service._intake._num_bytes == 0


def test_client_that_leaves_ends_the_fetching_of_its_image(serve) -> None:
    with serve(allow_private_images=True) as running, socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        content = json.dumps({"model": "tiny", "messages": [user(ASK, image_part(url))]}).encode()
        with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2]))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            fetching, _ = silent.accept()
        with fetching:
            fetching.settimeout(10)
            with suppress(ConnectionError):
                while fetching.recv(1000):
                    pass
        wait_until(lambda: is_idle(running) and running.service._intake._num_bytes == 0)


def test_fetched_bytes_count_with_bodies(serve, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b" " * 10_000)
    website = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path))
    threading.Thread(target=website.serve_forever, args=(0.02,), daemon=True).start()
    message = user(ASK, image_part(f"http://127.0.0.1:{website.server_port}/a"))
    with serve(allow_private_images=True, max_body_bytes=1000) as running:  # 8 times as much for all
        with pytest.raises(openai.RateLimitError, match="Too much is being sent"):
            ask(running.client(), message)
        assert running.service._intake._num_bytes == 0
    website.shutdown()
    website.server_close()


def test_large_bodies_are_refused(serve) -> None:
    with serve(max_body_bytes=10_000) as running:
        for encoding in ({}, {"Transfer_Encoding": "chunked"}):
            body: Any = b" " * 10_001 if not encoding else iter([b" " * 5000] * 3)
            status, answer = post(running, body, **encoding)
            assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
        assert text(running.client(), user(ASK))


@pytest.mark.parametrize("form", ['"messages":[%s]', '"messages":[{"role":"user","content":[%s]}]', '"metadata":[%s]'])
def test_many_wrong_values_cost_little(running: Running, form: str) -> None:
    """Each of them was an error of its own once, and nobody else was answered meanwhile."""
    for num_values in (2**16, 2**19, 2**22):
        body = ('{"model":"tiny",' + form % ",".join(["1"] * num_values) + "}").encode()
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(post, running, body)
            while not answer.done():
                with urllib.request.urlopen(f"{running.address}/health", timeout=5) as health:
                    assert health.status == 200
        assert answer.result()[0] == (400 if num_values < 2**19 else 413)
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json('{"model":"tiny",' + form % "1,1,1" + ', "n": 0}')
    assert caught.value.error_count() <= 2  # n, and the first value or the field that is not there


def test_long_text_beside_large_images_is_taken(running: Running) -> None:
    picture = data_url(Image.effect_noise((1000, 1000), 99), "BMP")
    assert len(picture) > 2**20
    body = {"model": "tiny", "messages": [user("word " * 500, image_part(picture))], "max_tokens": 2}
    status, answer = post(running, json.dumps(body).encode())
    assert status == 200, answer


def png_header(width: int, height: int) -> bytes:
    """A PNG file that promises much and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("width", "height"), [(7000, 7000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (2**30, 1)])
def test_image_bombs_are_refused_unopened(client, width: int, height: int) -> None:
    content = base64.b64encode(png_header(width, height)).decode()
    with pytest.raises(openai.BadRequestError, match="40000000 pixels") as caught:
        ask(client, user(ASK, image_part(f"data:image/png;base64,{content}")))
    assert caught.value.code == "invalid_image"


def test_files_that_are_no_pictures_are_refused(client) -> None:
    """Among them formats whose decoders start other programs or are rarely looked after."""
    files = {"text": b"hello", "empty": b"", "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    for kind in ("TIFF", "PPM", "ICO"):
        file = io.BytesIO()
        Image.new("RGB", (9, 9)).save(file, kind)
        files[kind] = file.getvalue()
    whole = base64.b64decode(data_url(Image.effect_noise((50, 50), 9)).partition(",")[2])
    files["cut"] = whole[: len(whole) // 2]
    files["zipped"] = gzip.compress(whole)
    for content in files.values():
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        with pytest.raises(openai.BadRequestError, match=r"unknown format|does not decode"):
            ask(client, user(ASK, image_part(url)))


def test_image_bytes_are_limited(serve) -> None:
    picture = data_url(Image.effect_noise((100, 100), 50))
    size = len(base64.b64decode(picture.partition(",")[2]))
    with serve(max_image_bytes=size) as running:
        assert text(running.client(), user(ASK, image_part(picture)))
    with serve(max_image_bytes=size - 9) as running, pytest.raises(openai.BadRequestError, match="larger than"):
        ask(running.client(), user(ASK, image_part(picture)))


def test_web_images_are_fetched_where_allowed(serve, vlm: Cobra, pictures, tmp_path: Path) -> None:
    pictures[0].save(tmp_path / "a.png")
    website = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path))
    threading.Thread(target=website.serve_forever, args=(0.02,), daemon=True).start()
    message = user(ASK, image_part(f"http://127.0.0.1:{website.server_port}/a.png"))
    with serve(allow_private_images=True) as running:
        assert text(running.client(), message) == vlm.generate(pictures[0], ASK, max_new_tokens=12)
        missing = user(ASK, image_part(f"http://127.0.0.1:{website.server_port}/b.png"))
        with pytest.raises(openai.BadRequestError, match="status 404"):
            ask(running.client(), missing)
    with serve() as running, pytest.raises(openai.BadRequestError, match="not public"):
        ask(running.client(), message)
    no_urls = serve(image_urls=False, allow_private_images=True)
    with no_urls as running, pytest.raises(openai.BadRequestError, match="fetches no images"):
        ask(running.client(), message)
    website.shutdown()
    website.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_web_pages_are_let_in_only_by_name(serve) -> None:
    def allowed(running: Running) -> str | None:
        headers = {"Origin": "https://page.test", "Access-Control-Request-Method": "POST"}
        request = urllib.request.Request(f"{running.address}/v1/chat/completions", headers=headers, method="OPTIONS")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.headers["Access-Control-Allow-Origin"]
        except urllib.error.HTTPError as error:
            return error.headers["Access-Control-Allow-Origin"]

    with serve() as running:
        assert allowed(running) is None
        status, _ = post(running, b"{}", Content_Type="text/plain")  # what a page may send without being let in
        assert status == 415
    with serve(cors_origins=["https://page.test"]) as running:
        assert allowed(running) == "https://page.test"


def test_stopping_lets_answers_end_and_takes_no_new_ones(serve) -> None:
    with serve() as running:
        client = running.client()
        stream = begun(client, max_tokens=300)
        running.server.drain()
        with pytest.raises(openai.InternalServerError) as caught:
            text(client, user(ASK))
        assert caught.value.status_code == 503 and caught.value.code == "stopping"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{running.address}/health", timeout=10)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_stopping_cuts_answers_that_take_too_long(serve) -> None:
    with serve(shutdown_timeout=0.2) as running:
        stream = begun(running.client())
        running.server.drain()
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_each_request_has_a_line_in_the_log_without_its_content(running: Running, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="cobra"):
        ask(running.client(), user("my secret"))
        with pytest.raises(openai.BadRequestError):
            ask(running.client(), user("my secret"), temperature=99)
        with pytest.raises(openai.NotFoundError):
            running.client().models.retrieve("a\nb")
        wait_until(lambda: sum(record.name == "cobra.serve.app" for record in caplog.records) == 3)
    lines = [record.getMessage() for record in caplog.records if record.name == "cobra.serve.app"]
    assert "secret" not in "".join(lines) and "\n" not in "".join(lines)
    assert " 200 " in lines[0] and "tokens=12" in lines[0] and " 400 " in lines[1]


def test_metrics_count(serve) -> None:
    with serve() as running:
        client = running.client()
        answer = ask(client, user(ASK))
        list(ask(client, user(ASK), stream=True))
        with pytest.raises(openai.BadRequestError):
            ask(client, user(ASK), n=0)
        wait_until(lambda: running.service.metrics.text(0).count("request_seconds_count 3") == 1)  # after the answer
        with urllib.request.urlopen(f"{running.address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['cobra_requests_total{status="200"}'] == "2"
    assert values['cobra_requests_total{status="400"}'] == "1"
    assert values["cobra_prompt_tokens_total"] == str(2 * answer.usage.prompt_tokens)
    assert values["cobra_completion_tokens_total"] == "24"
    assert values["cobra_first_token_seconds_count"] == "1" and values["cobra_open_answers"] == "0"
