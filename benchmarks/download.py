"""Throughput of a download from this machine itself, beside curl's.

    python benchmarks/download.py                     # 1 GiB, five times each
    python benchmarks/download.py --megabytes 2048 --folder /dev/shm

One process serves the file with `sendfile`, to curl and to Cobra alike. Rounds alternate, and the best of each counts:
other work on the machine only slows. Every row includes bringing the bytes to the disk (`fsync`), which Cobra does
before a file gets its name and curl does not; `--folder` on a disk in memory leaves the disk out. hashlib computes the
checksum of what curl has fetched, afterwards. CPU seconds are those of the tool, without the server's.
"""

import argparse
import hashlib
import json
import os
import socketserver
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import Process, Queue
from pathlib import Path

from cobra.data.prepare.download import RemoteFile, download

URL = "http://127.0.0.1:{}/file"


class Handler(socketserver.StreamRequestHandler):
    """HTTP with ranges, and nothing more than a download needs."""

    path: Path

    def handle(self) -> None:  # noqa: D102
        with suppress(ConnectionError), self.path.open("rb") as file:
            size = self.path.stat().st_size
            while line := self.rfile.readline():
                start, stop, status = 0, size, "200 OK"
                while line.strip():
                    name, _, value = line.decode().partition(":")
                    if name.lower() == "range":
                        first, _, last = value.strip().removeprefix("bytes=").partition("-")
                        start, stop, status = int(first), min(size, int(last) + 1), "206 Partial Content"
                    line = self.rfile.readline()
                self.wfile.write(
                    f'HTTP/1.1 {status}\r\nContent-Length: {stop - start}\r\nETag: "1"\r\n'
                    f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n\r\n".encode()
                )
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, min(stop - start, 2**26))


def serve(path: Path, port: "Queue[int]") -> None:
    Handler.path = path
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        port.put(server.server_address[1])
        server.serve_forever()


def with_curl(url: str, target: Path, size: int, checksum: str | None) -> None:
    subprocess.run(["curl", "--silent", "--fail", "--output", str(target), url], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())
        if checksum is not None:
            found = hashlib.sha256()
            while block := file.read(2**22):
                found.update(block)
            assert checksum == f"sha256:{found.hexdigest()}"
    assert target.stat().st_size == size


def with_cobra(url: str, target: Path, size: int, checksum: str | None, connections: int) -> None:
    download([RemoteFile(urls=(url,), target=target, size=size, checksum=checksum)], connections=connections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    tools: dict[str, Callable[[str, Path, int, str | None], None]] = {
        "curl": with_curl,
        "cobra, 1 connection": partial(with_cobra, connections=1),
        "cobra, 4 connections": partial(with_cobra, connections=4),
    }
    size = arguments.megabytes * 2**20
    seconds: dict[tuple[str, bool], list[float]] = {(tool, check): [] for check in (False, True) for tool in tools}
    cpu_seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in seconds}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, digest = Path(name) / "source", hashlib.sha256()
        block = os.urandom(2**20)
        with source.open("wb") as file:
            for _ in range(arguments.megabytes):
                file.write(block)
                digest.update(block)
        port: Queue[int] = Queue()
        server = Process(target=serve, args=(source, port), daemon=True)
        server.start()
        url = URL.format(port.get())
        for _ in range(arguments.rounds):
            for (tool, check), results in seconds.items():
                target = Path(name) / "new" / "target"
                target.parent.mkdir()
                started, busy = time.perf_counter(), sum(os.times()[:4])
                tools[tool](url, target, size, f"sha256:{digest.hexdigest()}" if check else None)
                results.append(time.perf_counter() - started)
                cpu_seconds[tool, check].append(sum(os.times()[:4]) - busy)
                for path in target.parent.iterdir():
                    path.unlink()
                target.parent.rmdir()
        server.terminate()
    print(f"{'':20} {'checksum':>10} {'MB/s':>8} {'of curl':>8} {'CPU s':>8}")
    speeds = {key: size / 1e6 / min(results) for key, results in seconds.items()}
    for (tool, check), speed in speeds.items():
        of_curl, cpu = speed / speeds["curl", check], min(cpu_seconds[tool, check])
        print(f"{tool:20} {'sha256' if check else 'none':>10} {speed:8.0f} {of_curl:8.2f} {cpu:8.2f}")
    print(json.dumps({f"{tool}{', sha256' * check}": round(speed) for (tool, check), speed in speeds.items()}))


if __name__ == "__main__":
    main()
