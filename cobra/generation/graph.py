"""Decoding on a GPU: several steps at a time, as a CUDA graph that the device runs without the host.

A step of one row is hundreds of small kernels, and a host that starts them one by one keeps a fast GPU waiting. So a
run of steps, sampling included, is captured once and replayed. A graph reads and writes fixed addresses: rows live in
buffers for 1, 2, 4, 8, ... of them, in which a run updates them in place, and rows that come or go are copied. The host
sees the tokens after a run; those behind the end of an answer are dropped there.

On a CPU there is nothing to gain: one kernel runs all blocks, and `torch.compile` of the plain operations took 1.4 to
2.3 times as long (width 768, six layers, one thread; and 40 s to compile), so it is not used.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cobra.generation.rows import Rows, Stepper, advance, one_step
from cobra.generation.sampling import Filters, RowOptions
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.ops.dispatch import forced_backend

log = logging.getLogger(__name__)

RUN_LENGTHS = (1, 4, 16)  # steps; a run copies the states once, and each of its steps reads and writes them
MOST_GRAPHS = 32  # kept for a batch: all lengths at 1 to 64 rows are 21, and a few of another kind of sampling
MOST_IDLE = 2  # batches' graphs kept for a model's next calls: one, and one more for a caller beside it
MOST_FAILURES = 2  # captures; the first may be due to what else was going on
WARM_UPS = 2  # before a capture: kernels are compiled and libraries make their workspaces
FEW = 128  # likeliest tokens that most users of top_k ask for at most

Replay = Callable[[], object]
Capture = Callable[[Callable[[], None]], Replay]  # runs the steps any number of times, or never

_capturing = threading.Lock()  # a process captures one graph at a time


class CudaCapture:
    """Captures CUDA graphs on the current device.

    They share their memory, as only one of them runs at a time. It goes with the last of them, and the next graph needs
    another `CudaCapture` then.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()  # one for all, as memory is shared within a stream

    def __call__(self, body: Callable[[], None]) -> Replay:
        """Run the body a few times, then capture it. Other threads may use the device meanwhile."""
        own = torch.cuda.current_stream()
        with _capturing, torch.cuda.stream(own):  # back on it whatever happens
            self._side.wait_stream(own)
            with torch.cuda.stream(self._side):
                for _ in range(WARM_UPS):
                    body()
            own.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph,
                pool=self._pool,  # type: ignore[arg-type]
                stream=self._side,  # PyTorch's own is on whichever device captured first
                capture_error_mode="thread_local",
            ):
                body()
        return graph.replay


@dataclass(frozen=True)
class _Run:
    """A captured run of steps: replaying it advances the rows in its buffers."""

    buffers: Rows  # the same for all runs of a bucket and filters; between filters, only the sampler differs
    tokens: Tensor  # [count, bucket], what the last replay chose
    replay: Replay


class GraphStepper:
    """Advances rows by captured runs of 1, 4 or 16 steps. It serves one batch of rows at a time."""

    def __init__(self, new_capture: Callable[[], Capture]) -> None:
        """Begin without graphs; they are captured when they are first needed."""
        self._new_capture = new_capture
        self._capture: Capture | None = None
        self._failures = 0
        self._runs: dict[tuple[int, Filters, int], _Run] = {}  # by bucket, sampling and steps; the last used is last
        self._model: tuple[object, ...] | None = None
        self._inside: MambaState | None = None  # of the rows in the buffers; any change of them makes a new one

    def __call__(self, llm: MambaLM, rows: Rows, limit: int) -> Tensor:
        """Advance rows by one of the run lengths, at most `limit`: [count, B]."""
        num_rows, count = len(rows.tokens), max(length for length in RUN_LENGTHS if length <= limit)
        if rows.state is not self._inside:
            self._look_at(llm)
        key = (1 << (num_rows - 1).bit_length(), _coarse(rows.sampler.filters, llm.config.vocab_size), count)
        if key not in self._runs and self._model is not None and self._failures < MOST_FAILURES:
            self._take_out(rows)  # capturing may run the steps
            self._try_to_capture(llm, rows, *key)
        if key not in self._runs:
            return advance(llm, rows, count)
        run = self._runs[key] = self._runs.pop(key)
        self._put_in(rows, run.buffers)
        run.replay()
        return run.tokens[:, :num_rows]

    def _try_to_capture(self, llm: MambaLM, rows: Rows, bucket: int, filters: Filters, count: int) -> None:
        """Capture a run of steps; where that fails again, say so and try no more."""
        buffers = self._room_for(rows, bucket, filters)
        tokens = buffers.tokens.new_zeros(count, bucket)

        def body() -> None:
            moving = Rows(buffers.tokens, buffers.state, buffers.sampler)
            tokens.copy_(advance(llm, moving, count))
            for old, new in zip(_tensors(buffers), _tensors(moving), strict=True):
                old.copy_(new)

        try:
            with torch.cuda.device_of(rows.tokens):
                if self._capture is None or not self._runs:  # with the last graph went the memory of its capture
                    self._capture = self._new_capture()
                self._runs[bucket, filters, count] = _Run(buffers, tokens, self._capture(body))
        except RuntimeError as error:
            self._runs.clear()  # their memory may be what lacked, and is shared with what has failed
            self._failures += 1
            if self._failures == MOST_FAILURES:
                _tell(error)
        while len(self._runs) > MOST_GRAPHS:
            del self._runs[next(iter(self._runs))]

    def _room_for(self, rows: Rows, bucket: int, filters: Filters) -> Rows:
        """Return buffers for `bucket` rows like these."""

        def empty(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(bucket, *tensor.shape[1:])

        alike = [(kind, run.buffers) for (size, kind, _), run in self._runs.items() if size == bucket]
        for kind, buffers in alike:
            if kind == filters:
                return buffers
        sampler = copy.copy(rows.sampler)
        sampler.filters, sampler.options = filters, RowOptions(*map(empty, rows.sampler.options))
        if alike:
            return Rows(alike[0][1].tokens, alike[0][1].state, sampler)
        state = MambaState([empty(tensor) for tensor in rows.state.conv], [empty(tensor) for tensor in rows.state.ssm])
        return Rows(empty(rows.tokens), state, sampler)

    def _put_in(self, rows: Rows, buffers: Rows) -> None:
        """Move rows into buffers, unless they are there."""
        if rows.state is self._inside:
            return
        num_rows = len(rows.tokens)
        for buffer, tensor in zip(_tensors(buffers), _tensors(rows), strict=True):
            buffer[:num_rows].copy_(tensor)
        rows.tokens, rows.state = buffers.tokens[:num_rows], buffers.state[:num_rows]
        rows.sampler.options = RowOptions(*(tensor[:num_rows] for tensor in buffers.sampler.options))
        self._inside = rows.state

    def _take_out(self, rows: Rows) -> None:
        """Give rows memory of their own."""
        if rows.state is self._inside:
            rows.keep(range(len(rows.tokens)))
        self._inside = None

    def _look_at(self, llm: MambaLM) -> None:
        """Drop graphs that would do something else than the model does now."""
        model = _fingerprint(llm)
        if model != self._model:
            self._runs.clear()
            self._model = model


def _fingerprint(llm: MambaLM) -> tuple[object, ...] | None:
    """Return what a graph holds on to: the weights' places and types, and the backend, but not the weights' values.

    None for a model that others' code takes part in (hooks, adapters): a replay would not run it.
    """
    found: list[object] = [forced_backend()]
    for module in llm.modules():
        own: dict[str, Any] = module.__dict__
        is_known = type(module).__module__.startswith(("torch.nn.", "cobra."))
        if not is_known or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return None
        found.append(type(module))
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            found += () if tensor is None else (tensor.data_ptr(), tensor.dtype)
    return tuple(found)


def new_stepper(llm: MambaLM) -> Stepper:
    """Return the way to decode that suits the model's device."""
    return GraphStepper(CudaCapture) if llm.backbone.embedding.weight.is_cuda else one_step


_idle: WeakKeyDictionary[MambaLM, list[GraphStepper]] = WeakKeyDictionary()
_idle_lock = threading.RLock()  # the garbage collector may end a loan at any time, in a thread that has it


@contextmanager
def lent_stepper(llm: MambaLM) -> Iterator[Stepper]:
    """Lend a way to decode, whose graphs are kept for the next call."""
    stepper = new_stepper(llm)  # costs nothing, and the model may have moved since the last call
    if not isinstance(stepper, GraphStepper):
        yield stepper
        return
    with _idle_lock:
        idle = _idle.setdefault(llm, [])
        stepper = idle.pop() if idle else stepper
    try:
        yield stepper
    finally:
        with _idle_lock:
            if len(idle) < MOST_IDLE:
                idle.append(stepper)


def release_graphs(llm: MambaLM) -> None:
    """Drop the graphs that wait for a model's next call, and those in use when they come back.

    They go with the model too, if nobody calls this.
    """
    with _idle_lock:
        _idle.pop(llm, None)


_told = False


def _tell(error: RuntimeError) -> None:
    """Warn, once in a process."""
    global _told
    if not _told:
        _told = True
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        log.warning("Decoding without CUDA graphs, which is slower: capturing them failed (%s).", reason)


def _tensors(rows: Rows) -> list[Tensor]:
    return [rows.tokens, *rows.state.conv, *rows.state.ssm, *rows.sampler.options]


def _coarse(filters: Filters, vocab_size: int) -> Filters:
    """Return filters that do the same, of fewer kinds, as each kind is a graph of its own."""
    few = filters.top_k if filters.top_k == 0 else FEW if filters.top_k <= FEW else vocab_size
    return filters._replace(top_k=few)
