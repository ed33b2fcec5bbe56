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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cobra.generation.rows import Rows, Stepper, advance, one_step
from cobra.generation.sampling import Filters, RowOptions
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.ops.dispatch import forced_backend

log = logging.getLogger(__name__)

LONGEST_RUN = 16  # steps; a run copies the states once, and each of its steps reads and writes them
WARM_UPS = 2  # before a capture: kernels are compiled and libraries make their workspaces
FEW = 128  # likeliest tokens that most users of top_k ask for at most

Replay = Callable[[], object]
Capture = Callable[[Callable[[], None]], Replay]  # runs the steps any number of times, or never


class CudaCapture:
    """Captures CUDA graphs that share their memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Replay:
        """Run the body a few times, then capture it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[arg-type]
            body()
        return graph.replay


@dataclass(frozen=True)
class _Run:
    """A captured run of steps: replaying it advances the rows in its buffers."""

    buffers: Rows
    tokens: Tensor  # [count, bucket], what the last replay chose
    replay: Replay


class GraphStepper:
    """Advances rows by captured runs of 1, 2, 4, 8 or 16 steps. It serves one batch of rows at a time."""

    def __init__(self, capture: Capture) -> None:
        """Begin without graphs; they are captured when they are first needed."""
        self._capture: Capture | None = capture
        self._buffers: dict[tuple[int, Filters], Rows] = {}  # by bucket and what is needed of the sampling
        self._runs: dict[tuple[int, Filters, int], _Run] = {}  # and by number of steps
        self._model: tuple[object, ...] = ()
        self._inside: MambaState | None = None  # of the rows in the buffers; any change of them makes a new one

    def __call__(self, llm: MambaLM, rows: Rows, limit: int) -> Tensor:
        """Advance rows by a power of two of tokens, at most `limit`: [count, B]."""
        num_rows, count = len(rows.tokens), _power_of_two_below(min(limit, LONGEST_RUN))
        if rows.state is not self._inside:
            self._forget_other_models(llm)
        bucket, filters = 1 << (num_rows - 1).bit_length(), _coarse(rows.sampler.filters, llm.config.vocab_size)
        if self._capture is not None and (bucket, filters, count) not in self._runs:
            self._take_out(rows)  # capturing may run the steps
            self._try_to_capture(llm, rows, bucket, filters, count)
        if self._capture is None:
            return advance(llm, rows, count)
        run = self._runs[bucket, filters, count]
        self._put_in(rows, run.buffers)
        run.replay()
        return run.tokens[:, :num_rows]

    def _try_to_capture(self, llm: MambaLM, rows: Rows, bucket: int, filters: Filters, count: int) -> None:
        """Capture a run of steps; where that fails, say so once and never try again."""
        assert self._capture is not None
        buffers = self._room_for(rows, bucket, filters)
        tokens = buffers.tokens.new_zeros(count, bucket)

        def body() -> None:
            moving = Rows(buffers.tokens, buffers.state, buffers.sampler)
            tokens.copy_(advance(llm, moving, count))
            for old, new in zip(_tensors(buffers), _tensors(moving), strict=True):
                old.copy_(new)

        try:
            with torch.cuda.device_of(rows.tokens):
                self._runs[bucket, filters, count] = _Run(buffers, tokens, self._capture(body))
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            log.warning("Decoding without CUDA graphs, which is slower: capturing one failed (%s).", reason)
            self._capture = None
            self._runs.clear()
            self._buffers.clear()

    def _room_for(self, rows: Rows, bucket: int, filters: Filters) -> Rows:
        """Return buffers for `bucket` rows like these; only the samplers' depend on the filters."""
        if (bucket, filters) not in self._buffers:

            def empty(tensor: Tensor) -> Tensor:
                return tensor.new_zeros(bucket, *tensor.shape[1:])

            alike = [buffers for (size, _), buffers in self._buffers.items() if size == bucket]
            tokens = alike[0].tokens if alike else empty(rows.tokens)
            conv = alike[0].state.conv if alike else [empty(tensor) for tensor in rows.state.conv]
            ssm = alike[0].state.ssm if alike else [empty(tensor) for tensor in rows.state.ssm]
            sampler = copy.copy(rows.sampler)
            sampler.filters, sampler.options = filters, RowOptions(*map(empty, rows.sampler.options))
            self._buffers[bucket, filters] = Rows(tokens, MambaState(conv, ssm), sampler)
        return self._buffers[bucket, filters]

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

    def _forget_other_models(self, llm: MambaLM) -> None:
        """Drop graphs that read other weights, or by another backend."""
        tensors = [*llm.parameters(), *llm.buffers()]
        model = (forced_backend(), *(tensor.data_ptr() for tensor in tensors))
        if model != self._model:
            self._runs.clear()
            self._buffers.clear()
            self._model = model


def new_stepper(llm: MambaLM) -> Stepper:
    """Return the way to decode that suits the model's device."""
    return GraphStepper(CudaCapture()) if llm.backbone.embedding.weight.is_cuda else one_step


_idle: WeakKeyDictionary[MambaLM, list[GraphStepper]] = WeakKeyDictionary()


@contextmanager
def lent_stepper(llm: MambaLM) -> Iterator[Stepper]:
    """Lend a way to decode, whose graphs are kept for the next call."""
    idle = _idle.setdefault(llm, [])
    stepper = idle.pop() if idle else new_stepper(llm)
    try:
        yield stepper
    finally:
        if isinstance(stepper, GraphStepper):
            idle.append(stepper)


def _tensors(rows: Rows) -> list[Tensor]:
    return [rows.tokens, *rows.state.conv, *rows.state.ssm, *rows.sampler.options]


def _power_of_two_below(number: int) -> int:
    """The largest that is not above."""
    return 1 << (number.bit_length() - 1)


def _coarse(filters: Filters, vocab_size: int) -> Filters:
    """Return filters that do at least the same, of few kinds, as each kind is a graph of its own."""
    if not filters.draw:
        return filters
    top_k = filters.top_k if filters.top_k == 0 else FEW if filters.top_k <= FEW else vocab_size
    return filters._replace(top_k=top_k, top_p=True, min_p=True)
