"""Run compiled kernels on a few Python threads.

Not OpenMP: PyTorch and Numba would each bring a runtime of their own, and two runtimes that spin while they wait slow
each other down. Kernels release the interpreter lock, so plain threads do.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_SHARES = 4  # pieces per thread: a thread that is held up leaves its remaining pieces to the others

_pool: tuple[int, int, ThreadPoolExecutor] | None = None


def _workers(count: int) -> ThreadPoolExecutor:
    """The shared pool of `count` threads; a forked child, whose threads are gone, gets its own."""
    global _pool
    if _pool is None or _pool[:2] != (os.getpid(), count):
        _pool = (os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="cobra-ops"))
    return _pool[2]


def run(kernel: Callable[..., None], items: int, cost: int, *arguments: Any) -> None:
    """Call `kernel(start, stop, *arguments)` on pieces of `range(items)`, on up to `torch.get_num_threads()` threads.

    Items must not depend on each other; then the result does not depend on the number of threads. `cost` is the rough
    number of elementary operations of the whole call: small calls stay on the calling thread.
    """
    threads = min(torch.get_num_threads(), items)
    if threads < 2 or cost < 200_000:  # below about 50 microseconds waking a thread costs more than it saves
        kernel(0, items, *arguments)
        return
    size = max(1, items // (threads * _SHARES))
    starts = deque(range(0, items, size))

    def work() -> None:
        while True:
            try:
                start = starts.popleft()
            except IndexError:
                return
            kernel(start, min(start + size, items), *arguments)

    helpers = [_workers(torch.get_num_threads() - 1).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()
