"""The server under many streaming clients at once: errors, latency, tokens per second, memory.

    python benchmarks/serving.py --model runs/tiny                          # 64 clients, 10,000 requests
    python benchmarks/serving.py --model runs/tiny --requests 1000 --images 0.5
    python benchmarks/serving.py --address http://127.0.0.1:8000 --name tiny  # a server that runs already

The server runs in a process of its own, the clients in this one, on the same machine; each client sends its next
request when the one before is answered. Every answer is streamed and checked: it must end with a finish reason, the
number of tokens and [DONE]. Latency is from sending a request to its last byte, and the median and highest of them tell
whether anybody was kept waiting. Memory is the server's resident set, with all its threads, after the first twentieth
of the requests and after the last.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image

QUESTIONS = ("what shape is in the image?", "what color is the circle?", "is there a red shape?", "describe the image")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "serve.py"


@dataclass
class Results:
    """What the clients have seen."""

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


def make_bodies(name: str, images: float, max_tokens: int) -> list[bytes]:
    """Requests to choose from: questions with and without small images, answers of 1 to `max_tokens` tokens."""
    rng = random.Random(0)
    bodies = []
    for number in range(200):
        content = [{"type": "text", "text": rng.choice(QUESTIONS)}]
        if rng.random() < images:
            file = io.BytesIO()
            Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})  # type: ignore[dict-item]
        body = {
            "model": name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": rng.randint(1, max_tokens),
            "temperature": rng.choice([0.0, 1.5]),
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        bodies.append(json.dumps(body).encode())
    return bodies


async def ask(host: str, port: int, body: bytes, results: Results) -> None:
    """Send one request and read its stream, with as little work as possible: the clients share the server's cores."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    received, has_text = b"", False
    while block := await reader.read(2**16):
        received += block
        if not has_text and (b'"content":"' in received.replace(b'"content":""', b"")):
            has_text = True
            results.first_tokens.append(time.perf_counter() - started)
    writer.close()
    results.latencies.append(time.perf_counter() - started)
    counted = re.search(rb'"completion_tokens":(\d+)', received)
    is_finished = re.search(rb'"finish_reason":"(stop|length)"', received) and b"data: [DONE]" in received
    if not received.startswith(b"HTTP/1.1 200") or counted is None or not is_finished:
        results.errors.append(received[:300].decode(errors="replace"))
    else:
        results.tokens += int(counted[1])


async def load(address: str, bodies: list[bytes], clients: int, requests: int) -> Results:
    """Keep so many clients busy until all requests are answered."""
    host, port = urlsplit(address).hostname or "", urlsplit(address).port or 80
    results, numbers = Results(), iter(range(requests))

    async def client() -> None:
        for number in numbers:
            try:
                await asyncio.wait_for(ask(host, port, bodies[number % len(bodies)], results), 120)
            except (OSError, asyncio.TimeoutError) as error:
                results.errors.append(repr(error))

    await asyncio.gather(*(client() for _ in range(clients)))
    return results


def start(model: str) -> tuple[subprocess.Popen[str], str, str]:
    """Start a server; return it, its address and its model's name."""
    command = [sys.executable, str(SCRIPT), f"model={model}", "port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        found = re.match(r"(\S+) answers at (\S+)/v1", line)
        if found:
            return process, found[2], found[1]
    raise SystemExit("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what scripts/serve.py takes")
    parser.add_argument("--address", help="of a server that runs already")
    parser.add_argument("--name", help="of its model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--images", type=float, default=0.1, help="share of requests with an image")
    arguments = parser.parse_args()
    process, address, name = None, arguments.address, arguments.name
    if arguments.model:
        process, address, name = start(arguments.model)
        assert process.stderr is not None
        # Somebody has to read the log, or the server would wait for it.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        process.stderr.close()
    elif not (address and name):
        parser.error("give --model, or --address and --name")
    bodies = make_bodies(name, arguments.images, arguments.max_tokens)
    memory = psutil.Process(process.pid).memory_info if process else None
    early = min(max(arguments.clients, arguments.requests // 20), arguments.requests // 2)
    try:
        first = asyncio.run(load(address, bodies, arguments.clients, early))
        before = memory().rss / 2**20 if memory else float("nan")
        started = time.perf_counter()
        results = asyncio.run(load(address, bodies, arguments.clients, arguments.requests - early))
        seconds = time.perf_counter() - started
        after = memory().rss / 2**20 if memory else float("nan")
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)
            drain.wait(60)
    errors = first.errors + results.errors
    for error in errors[:5]:
        print("error:", error)
    if not results.latencies or not results.first_tokens:
        raise SystemExit("No request was answered with text; there is nothing to measure.")
    latency, token = np.array(results.latencies), np.array(results.first_tokens)
    table = {
        "requests": len(first.latencies) + len(results.latencies),
        "clients at once": arguments.clients,
        "errors": len(errors),
        "requests/s": len(latency) / seconds,
        "tokens/s": results.tokens / seconds,
        "latency, median (ms)": np.median(latency) * 1e3,
        "latency, 99 % (ms)": np.quantile(latency, 0.99) * 1e3,
        "latency, highest (ms)": latency.max() * 1e3,
        "highest / median": latency.max() / np.median(latency),
        "first text, median (ms)": np.median(token) * 1e3,
        "first text, 99 % (ms)": np.quantile(token, 0.99) * 1e3,
        "memory, early (MiB)": before,
        "memory, at the end (MiB)": after,
    }
    for label, value in table.items():
        print(f"{label:28} {value:12,.1f}" if isinstance(value, float) else f"{label:28} {value:12,}")
    print(json.dumps({label: round(float(value), 3) for label, value in table.items()}))
    if errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
