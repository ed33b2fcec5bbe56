"""One process per GPU, started and watched from here: what torchrun does, for one machine and without its command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import yaml

from cobra.errors import CTRL_C, STOPPED_EARLY, Interrupted, RankError
from cobra.runtime import num_cores

if TYPE_CHECKING:
    from cobra.config import EvaluateConfig, ParallelConfig

Process = subprocess.Popen[bytes]

HOST = "127.0.0.1"
SECONDS_TO_LEAVE = 20.0  # for the other ranks when one has failed, before they are killed
CALM = (0, STOPPED_EARLY, CTRL_C)  # exit codes of ranks that leave together
FORWARDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
WATCHES_PARENT = "COBRA_RANK_WATCHES_PARENT"


def processes_to_start(parallel: ParallelConfig | EvaluateConfig) -> int:
    """Return how many ranks to start here; 1 if this process is to do the work itself, alone or as one of several."""
    from cobra.ranks import env_ranks

    if "RANK" in os.environ or env_ranks() is not None:
        return 1
    if parallel.processes is not None:
        return parallel.processes
    if parallel.device not in ("auto", "cuda"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def run_ranks(config: Mapping[str, Any], count: int, script: Path) -> None:
    """Run `script --rerun <config>` in `count` processes that know each other, until all have ended.

    The config is composed once, here; ranks that composed it for themselves could disagree.

    Raises:
        RankError: a rank has failed, and the others have been stopped.
        Interrupted: the ranks were asked to stop, and did.
    """
    with tempfile.TemporaryDirectory(prefix="cobra-") as folder, socket.create_server((HOST, 0)) as server:
        frozen = Path(folder) / "config.yaml"
        frozen.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        processes: list[Process] = []
        try:
            for rank in range(count):
                processes.append(_start([str(script), "--rerun", str(frozen)], rank, count, server.getsockname()[1]))
            with _forwarding_signals(processes) as forwarded:
                _store = _host_store(server)  # while the ranks are still importing torch
                code = _watch(processes, forwarded)
        finally:
            _stop(processes)
    if code != 0:
        raise Interrupted("", code)  # rank 0 has said it


def is_started_rank() -> bool:
    """Whether this process is a rank that `run_ranks` has started."""
    return WATCHES_PARENT in os.environ


def follow_parent() -> None:
    """In a started rank: end at once when its parent is gone, however that one ended, and at a signal from it.

    Python's own handlers would never run while the rank waits for another one in C++. Training sets handlers that save.
    """
    if is_started_rank():
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)


def _end_with_stdin() -> None:
    while os.read(0, 4096):  # the parent writes nothing; its end of the pipe closes when it is gone
        pass
    os._exit(1)


def _start(command: Sequence[str], rank: int, count: int, port: int) -> Process:
    environment = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // count)),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store at that port is ours: rank 0 opens none
        WATCHES_PARENT: "1",
    }
    # In a session of its own a rank gets Ctrl-C from us, once, and not from the terminal as well.
    return subprocess.Popen([sys.executable, *command], env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _host_store(server: socket.socket) -> object:
    """Serve the store where the ranks meet, on a port that nobody can take in between: it is open already."""
    from torch import distributed

    port = server.getsockname()[1]
    return distributed.TCPStore(  # type: ignore[attr-defined]  # documented, though pyright does not see it
        HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
    )


@contextmanager
def _forwarding_signals(processes: Sequence[Process]) -> Iterator[set[int]]:
    """Pass signals on to the ranks; yields the numbers of those passed on so far."""
    forwarded: set[int] = set()

    def forward(number: int, _frame: object) -> None:
        forwarded.add(number)
        for process in processes:
            process.send_signal(number)  # does nothing to one that has ended

    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield forwarded
        return
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[Process], forwarded: set[int]) -> int:
    """Wait until all ranks have left calmly and return their exit code; the first other end ends the wait."""
    ended: Queue[int] = Queue()

    def wait(rank: int) -> None:
        processes[rank].wait()
        ended.put(rank)

    for rank in range(len(processes)):
        threading.Thread(target=wait, args=(rank,), daemon=True).start()
    codes: list[int] = []
    for _ in processes:
        rank = ended.get()
        code = processes[rank].returncode
        if -code in forwarded:  # it did not handle the signal: nothing is to be saved, and the others may wait for it
            exit_code = CTRL_C if -code == signal.SIGINT else STOPPED_EARLY
            raise Interrupted(f"Stopped by {signal.Signals(-code).name}; the same command goes on.", exit_code)
        if code not in CALM:
            raise _failure(rank, len(processes), code)
        codes.append(code)
    return max(codes)


def _failure(rank: int, count: int, code: int) -> RankError:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " Linux does that when memory runs out; dmesg tells." if name == "SIGKILL" else ""
        return RankError(f"Rank {rank} of {count} was killed by {name}.{hint} The other ranks are stopped.", 128 - code)
    return RankError(
        f"Rank {rank} of {count} failed with exit code {code}; its own message is above. The other ranks are stopped.",
        code,
    )


def _stop(processes: Sequence[Process]) -> None:
    """End what still runs, kindly at first."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
