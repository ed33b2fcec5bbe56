"""Speed and memory of the sequence model's operations, side by side with what a user would pick instead.

    python benchmarks/ops.py                # on the CPU and, where there is one, on the GPU
    python benchmarks/ops.py --slow         # also loops over time on the large shape: some minutes
    python benchmarks/ops.py --only scan --device cpu --threads 2 --json ops.json
    python benchmarks/ops.py --only step    # what decoding one token consists of: fused, and in single operations

Rows of one case compute the same thing; one whose outputs or gradients disagree with the reference is marked. They run
in turns, and a time is the least of several, so that a busy machine troubles all alike.

    floor      the least time the machine allows: the bytes that must move at its bandwidth or, if that takes longer,
               the exponentials at the rate of our CPU kernel's own exp (on a GPU: bytes alone). What stays in a CPU's
               caches between runs moves faster than that; a GPU's cache is overwritten before every run.
    GB/s       those bytes by the time
    peak       growth of memory during the call, results included (on the CPU: resident memory, Linux only)
    fused      one token through some blocks, or a matrix times a few vectors, in the kernels of `cobra.ops.fused`;
               beside them the same in single operations, and PyTorch's own product with a dequantised matrix. On a
               GPU all of them run as CUDA graphs, as in decoding
    transformers   the recurrence of the slow path of transformers, which is no function there and is spelled out here
    mambapy    its parallel scan, which transformers can use instead
"""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from step_cases import as_graph, step_cases
from torch import Tensor

import cobra.ops
from cobra.ops.dispatch import discover

CPU_SHAPES = [(32, 96, 256, 16), (1, 800, 1536, 16)]  # batch, length, dim, state: the tiny model, mamba-130m
GPU_SHAPES = [(1, 1024, 5120, 16), (16, 1024, 5120, 16)]  # mamba-2.8b
SECONDS = 4.0  # for each row of a case
MEBIBYTE = 2**20

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on tensors of one size, and everything that can compute it."""

    operation: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    functions: Mapping[str, Function]
    definition: Function
    passes: tuple[str, ...] = ("forward", "forward+backward")
    bytes_moved: Mapping[str, int]
    exponentials: Mapping[str, int]
    tolerance: float | None = None  # by the dtype if None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured row; times in milliseconds, memory in MiB."""

    operation: str
    shape: tuple[int, ...]
    device: str
    passes: str
    name: str
    milliseconds: float
    floor: float
    gigabytes_per_second: float
    peak: float | None
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the device can do at most."""

    device: torch.device
    bytes_per_second: float
    exponentials_per_second: float

    def floor(self, bytes_moved: int, exponentials: int) -> float:
        """Milliseconds."""
        return 1e3 * max(bytes_moved / self.bytes_per_second, exponentials / self.exponentials_per_second)


def scan_tensors(
    batch: int, length: int, dim: int, state: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs of the sizes that a trained Mamba has: steps of 0.001 to 0.1, decay rates 1 to `state`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    steps = torch.exp(torch.rand(dim, generator=generator) * 4.6 - 6.9)
    inputs = {
        "u": draw(batch, length, dim),
        "delta": draw(batch, length, dim) * 0.1,
        "B": draw(batch, length, state),
        "C": draw(batch, length, state),
        "z": draw(batch, length, dim),
    }
    parameters = {
        "A": -torch.arange(1.0, state + 1).repeat(dim, 1),
        "D": torch.ones(dim),
        "delta_bias": torch.log(torch.expm1(steps)),
    }
    tensors = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    tensors |= {name: tensor.to(device) for name, tensor in parameters.items()}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def ours(backend: str, operation: str, **options: object) -> Function:
    function = getattr(cobra.ops, operation)

    def call(**tensors: Tensor) -> tuple[Tensor, ...]:
        with cobra.ops.use_backend(backend):
            return function(**tensors, **options)

    return call


def mambapy_scan(
    *, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> tuple[Tensor]:
    """mambapy's parallel scan over [batch, length, dim, state] tensors, with the rest around it."""
    from mambapy.pscan import pscan

    dt = F.softplus(delta + delta_bias)[..., None]
    states = pscan(torch.exp(dt * A), dt * B[:, :, None, :] * u[..., None])
    y = (states @ C[..., None]).squeeze(-1)
    return ((y + D * u) * F.silu(z),)


def transformers_scan(
    *, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> tuple[Tensor]:
    """Discretised at once, then a loop over time, channels first."""
    x = u.transpose(1, 2)
    dt = F.softplus(delta + delta_bias).transpose(1, 2)[..., None]  # [batch, dim, length, 1]
    decay = torch.exp(A[None, :, None, :] * dt)
    inputs = dt * B[:, None] * x[..., None]
    h = torch.zeros_like(decay[:, :, 0])
    ys = []
    for t in range(u.shape[1]):
        h = decay[:, :, t] * h + inputs[:, :, t]
        ys.append(torch.matmul(h, C[:, t, :, None])[..., 0])
    y = torch.stack(ys, dim=-1) + x * D[None, :, None]
    return ((y * F.silu(z.transpose(1, 2))).transpose(1, 2),)


def torch_conv(*, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """PyTorch's own depthwise convolution, which wants channels first."""
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
    return (F.silu(y[..., : x.shape[1]]).transpose(1, 2),)


def torch_norm(*, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """PyTorch's own RMSNorm after an addition in float32."""
    total = x.float() + residual
    return F.rms_norm(total, weight.shape, weight, eps).to(x.dtype), total


def cases(device: torch.device, backends: list[str], slow: bool) -> list[Case]:
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    size = dtype.itemsize
    found: list[Case] = []
    for shape in CPU_SHAPES if on_cpu else GPU_SHAPES:
        batch, length, dim, state = shape
        tensors = scan_tensors(*shape, device, dtype)
        wide, narrow = size * batch * length * dim, size * batch * length * state
        loops = shape == CPU_SHAPES[0] or slow
        functions = {
            name: ours(name, "selective_scan", delta_softplus=True) for name in backends if name != "reference"
        }
        functions |= {"mambapy": mambapy_scan} if on_cpu and find_spec("mambapy") else {}
        if loops:
            functions["reference"] = ours("reference", "selective_scan", delta_softplus=True)
            functions["transformers"] = transformers_scan
        found.append(
            Case(
                operation="selective_scan", shape=shape, tensors=tensors, functions=functions,
                definition=ours("reference", "selective_scan", delta_softplus=True),
                # u, delta, z, B, C in, y out; then those and dy in, du, ddelta, dz, dB, dC out
                bytes_moved={"forward": 4 * wide + 2 * narrow, "forward+backward": 11 * wide + 6 * narrow},
                exponentials={"forward": wide // size * state, "forward+backward": 2 * (wide // size) * state},
            )
        )  # fmt: skip
        step = {name: t[:, 0].detach() if t.dim() == 3 else t.detach() for name, t in tensors.items()}
        step["state"] = torch.zeros(batch, dim, state, device=device)
        found.append(
            Case(
                operation="selective_state_update", shape=(batch, dim, state), tensors=step, passes=("forward",),
                functions={name: ours(name, "selective_state_update", delta_softplus=True) for name in backends},
                definition=ours("reference", "selective_state_update", delta_softplus=True),
                bytes_moved={"forward": 4 * (2 * batch + 1) * dim * state + 4 * size * batch * dim},
                exponentials={"forward": batch * dim * state},
            )
        )  # fmt: skip
        conv = {"x": tensors["u"], "weight": torch.randn(dim, 4, device=device, requires_grad=True)}
        conv["bias"] = torch.zeros(dim, device=device, requires_grad=True)
        found.append(
            Case(
                operation="causal_conv1d", shape=(batch, length, dim, 4), tensors=conv,
                functions={name: ours(name, "causal_conv1d") for name in backends} | {"torch": torch_conv},
                definition=ours("reference", "causal_conv1d"),
                bytes_moved={"forward": 2 * wide, "forward+backward": 5 * wide},
                exponentials={"forward": tensors["u"].numel(), "forward+backward": 2 * tensors["u"].numel()},
            )
        )  # fmt: skip
        norm = {"x": tensors["u"], "residual": torch.randn(batch, length, dim, device=device, requires_grad=True)}
        norm["weight"] = torch.ones(dim, device=device, requires_grad=True)
        full = 4 * batch * length * dim  # the residual is float32
        found.append(
            Case(
                operation="add_rms_norm", shape=(batch, length, dim), tensors=norm,
                functions={name: ours(name, "add_rms_norm", eps=1e-5) for name in backends}
                | {"torch": lambda **given: torch_norm(**given, eps=1e-5)},
                definition=ours("reference", "add_rms_norm", eps=1e-5),
                # x and residual in, normed and sum out; then sum and two gradients in, two gradients out
                bytes_moved={"forward": 2 * wide + 2 * full, "forward+backward": 4 * wide + 5 * full},
                exponentials={"forward": 0, "forward+backward": 0},
            )
        )  # fmt: skip
    return found


def cpu_exponentials_per_second() -> float:
    """How many of the CPU kernel's exponentials all threads together compute, on data in the first-level cache."""
    import numpy as np
    from numba import njit

    from cobra.ops.backends.cpu.threads import run
    from cobra.ops.backends.cpu.vector import LANES, exp2, load, store

    @njit(nogil=True)
    def kernel(start, stop, values):
        out = np.empty_like(values)
        for _ in range(start, stop):
            for at in range(0, values.size, LANES):
                store(out, at, exp2(load(values, at)))

    values, repeats = np.linspace(-10, 0, 1024, dtype=np.float32), 40_000
    run(kernel, 8, 1, values)
    seconds = least_seconds({"": lambda: run(kernel, repeats, 10**9, values)}, torch.device("cpu"))[""]
    return repeats * values.size / seconds


def bytes_per_second(device: torch.device) -> float:
    """Bytes read and written by a copy too large for any cache."""
    source = torch.zeros((2**28 if device.type == "cpu" else 2**31) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / least_seconds({"": lambda: target.copy_(source)}, device)[""]


def least_seconds(functions: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The least time of each function; they take turns, each runs at least twice and for about `SECONDS`."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    waiting = dict(functions)
    while waiting:
        for name, function in list(waiting.items()):
            for _ in range(4):  # in a row: threads of the one before may still spin during the first
                times[name].append(_seconds(function, device))
                if len(times[name]) >= 2 and (sum(times[name]) > SECONDS or len(times[name]) >= 100):
                    del waiting[name]
                    break
    return {name: min(values) for name, values in times.items()}


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # nothing of the last run is left in the cache
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_mebibytes(function: Callable[[], object], device: torch.device) -> float | None:
    """By how much memory grows at most while the function runs; None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed by earlier cases is reused and the growth hidden
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = _resident_peak()
        function()
        return _resident_peak() - before
    except (OSError, AttributeError):
        return None


def _resident_peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _call(function: Function, tensors: Mapping[str, Tensor], passes: str) -> Callable[[], tuple[Tensor, ...]]:
    """A run: forward gives the outputs, both passes the gradients through the first one."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function(**tensors)

    def both() -> tuple[Tensor, ...]:
        outputs = function(**tensors)
        return torch.autograd.grad(outputs[0], list(tensors.values()), torch.ones_like(outputs[0]))

    return forward if passes == "forward" else both


def _agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> bool:
    """Within `tolerance` of each tensor's largest number; peers may leave out the last outputs."""
    pairs = zip(found, expected, strict=False)
    return all(float((a.float() - b.float()).abs().max()) <= tolerance * float(b.float().abs().max()) for a, b in pairs)


def measure(case: Case, machine: Machine) -> list[Row]:
    device = machine.device
    tolerance = case.tolerance or (1e-4 if next(iter(case.tensors.values())).dtype == torch.float32 else 3e-2)
    rows: list[Row] = []
    for passes in case.passes:
        calls = {name: _call(function, case.tensors, passes) for name, function in case.functions.items()}
        if device.type == "cuda" and "step" in case.operation and passes == "forward":
            calls = {name: as_graph(call) for name, call in calls.items()}
        expected = _call(case.definition, case.tensors, passes)()
        agrees = {name: _agree(call(), expected, tolerance) for name, call in calls.items()}
        seconds = least_seconds(calls, device)
        rows += [
            Row(
                operation=case.operation,
                shape=case.shape,
                device=device.type,
                passes=passes,
                name=name,
                milliseconds=1e3 * seconds[name],
                floor=machine.floor(case.bytes_moved[passes], case.exponentials[passes]),
                gigabytes_per_second=case.bytes_moved[passes] / seconds[name] / 1e9,
                peak=peak_mebibytes(call, device),
                agrees=agrees[name],
            )
            for name, call in calls.items()
        ]
    return rows


def table(rows: list[Row]) -> str:
    """One line per row; the ratios say how many times faster than that peer a row is."""
    peers = ("torch", "single", "mambapy", "transformers")
    lines = [
        f"{'':14} {'ms':>10} {'of floor':>9} {'GB/s':>7} {'peak MiB':>9}" + "".join(f"{'x ' + p:>15}" for p in peers)
    ]
    times = {(row.operation, row.shape, row.passes, row.name): row.milliseconds for row in rows}
    group = None
    for row in rows:
        if group != (group := (row.operation, row.shape, row.passes)):
            lines.append(f"{row.operation} {list(row.shape)} {row.passes} on {row.device}, floor {row.floor:.3g} ms")
        peak = "" if row.peak is None else f"{row.peak:.0f}"
        line = f"  {row.name:12} {row.milliseconds:10.3f} {row.floor / row.milliseconds:9.0%}"
        line += f" {row.gigabytes_per_second:7.1f} {peak:>9}"
        for peer in peers:
            ratio = times.get((*group, peer), math.nan) / row.milliseconds
            line += f"{'' if math.isnan(ratio) else f'{ratio:.1f}':>15}"
        lines.append(line + ("" if row.agrees else "  WRONG RESULT"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also the loops over time on large shapes")
    parser.add_argument("--only", default="", help="operations with this in their name")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="both by default, where there are both")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's choice by default")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

    rows: list[Row] = []
    for device in map(torch.device, devices):
        backends = [
            name
            for name, module in discover().items()
            if module.available() is None and module.supports(device, torch.float32) is None
        ]
        bandwidth = bytes_per_second(device)
        rate = cpu_exponentials_per_second() if device.type == "cpu" and "cpu" in backends else math.inf
        machine = Machine(device=device, bytes_per_second=bandwidth, exponentials_per_second=rate)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        sys.stdout.write(f"{device}: {name}, {bandwidth / 1e9:.1f} GB/s copied, {rate / 1e9:.2f}e9 exponentials/s\n")
        for case in cases(device, backends, options.slow) + [Case(**given) for given in step_cases(device, backends)]:
            if options.only in case.operation:
                rows += measure(case, machine)
    sys.stdout.write(table(rows) + "\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
