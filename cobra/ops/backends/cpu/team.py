"""Let several threads work through one kernel whose phases depend on each other.

Every phase is a row of equal items that threads take one at a time, and it is over when all its items are done, not
when all threads have arrived. So nobody ever waits for a thread that has not started: a caller whose helpers are busy,
late or dead does all items alone, and any number of callers may share the helpers. A thread that waits, waits for one
item that another thread is computing at this moment.

A kernel must reach memory that is not among its arguments only while it holds an item: a helper may come when the
caller has long returned. It must not raise while it holds one.
"""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .threads import _workers

_SPINS = 4096  # looks at a counter before the processor is offered to others: about 0.1 ms
_LEAST_COST = 200_000  # elementary operations; see `threads.run`
_SLOT = 8  # numbers per counter: one cache line, so that threads do not slow each other down
_PAUSE = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}.get(platform.machine())

_give_way = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())


@intrinsic
def _fetch_add(typing_context, array, index):
    """Add one to `array[index]` and return what it was; what was written before is then seen by who reads it."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), ir.IntType(64)(1), "acq_rel")

    return types.int64(array, types.intp), generate


@intrinsic
def _read(typing_context, array, index):
    """`array[index]`, and all that its writer wrote before."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def _pause(typing_context):
    """Tell the processor that this is a waiting loop."""

    def generate(context, builder, signature, arguments):
        if _PAUSE:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, _PAUSE), [])
        return context.get_dummy_value()

    return types.void(), generate


@njit(forceinline=True)
def take(counters, phase):
    """The next item of a phase that nobody has; it may lie beyond the last."""
    return _fetch_add(counters, 2 * phase * _SLOT)


@njit(forceinline=True)
def finish(counters, phase):
    """Say that an item is done."""
    _fetch_add(counters, (2 * phase + 1) * _SLOT)


@njit
def wait(counters, phase, items):
    """Return when all items of a phase are done."""
    spins = 0
    while _read(counters, (2 * phase + 1) * _SLOT) < items:
        spins += 1
        if spins > _SPINS:
            _give_way()
        else:
            _pause()


def new_counters(phases: int) -> np.ndarray:
    """For one call of a kernel."""
    return np.zeros(2 * phases * _SLOT, np.int64)


def run_together(kernel: Callable[..., None], threads: int, *arguments: Any) -> None:
    """Call `kernel(thread, *arguments)` here as thread 0, and at once on `threads` - 1 helpers as 1, 2, ...

    Returns when the kernel returns here; helpers that have not started by then are called off.
    """
    helpers = []
    if threads > 1:
        with suppress(RuntimeError):  # no thread can be started any more: the kernel does without
            pool = _workers(threads - 1)
            helpers.extend(pool.submit(kernel, thread, *arguments) for thread in range(1, threads))
    kernel(0, *arguments)
    for helper in helpers:
        helper.cancel()


def team_size(cost: int) -> int:
    """How many threads a call of about `cost` elementary operations is worth."""
    return torch.get_num_threads() if cost >= _LEAST_COST else 1
