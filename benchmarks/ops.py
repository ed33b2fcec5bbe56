"""Speed and memory of the selective scan, side by side with what others ship for the CPU.

    python benchmarks/ops.py                # our backends and mambapy's parallel scan
    python benchmarks/ops.py --slow         # also the reference and transformers on the large shape: minutes

Every row computes the same thing: softplus of the step size, recurrence, skip and gate; rows that disagree with the
reference are marked. A time is the least of several runs. `floor` is the time that the exponentials alone need with
our kernel's own exp on the same threads (one per state element in the forward pass, one more in the backward pass),
and `of floor` is how much of a row's time that is. `peak` is the growth of resident memory (Linux only).
"""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

import argparse
import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cobra.ops

SHAPES = [(32, 96, 256, 16), (1, 800, 1536, 16)]  # batch, length, dim, state
SECONDS_PER_CASE = 5.0

Scan = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured case; times in milliseconds, memory in MiB."""

    backend: str
    shape: tuple[int, int, int, int]
    passes: str
    milliseconds: float
    floor: float
    peak: float | None
    agrees: bool


def arguments(batch: int, length: int, dim: int, state: int) -> dict[str, Tensor]:
    """Inputs of the sizes that a trained Mamba has: steps of 0.001 to 0.1, decay rates 1 to `state`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    steps = torch.exp(torch.rand(dim, generator=generator) * 4.6 - 6.9)
    tensors = {
        "u": draw(batch, length, dim),
        "delta": draw(batch, length, dim) * 0.1,
        "A": -torch.arange(1.0, state + 1).repeat(dim, 1),
        "B": draw(batch, length, state),
        "C": draw(batch, length, state),
        "D": torch.ones(dim),
        "z": draw(batch, length, dim),
        "delta_bias": torch.log(torch.expm1(steps)),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def ours(backend: str) -> Scan:
    def scan(**tensors: Tensor) -> Tensor:
        with cobra.ops.use_backend(backend):
            return cobra.ops.selective_scan(**tensors, delta_softplus=True)[0]

    return scan


def mambapy_scan(
    *, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """mambapy's parallel scan over [batch, length, dim, state] tensors, with the rest around it."""
    from mambapy.pscan import pscan

    dt = F.softplus(delta + delta_bias)[..., None]
    states = pscan(torch.exp(dt * A), dt * B[:, :, None, :] * u[..., None])
    y = (states @ C[..., None]).squeeze(-1)
    return (y + D * u) * F.silu(z)


def transformers_scan(
    *, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The recurrence of the slow path of transformers: discretised at once, then a loop over time, channels first."""
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
    return (y * F.silu(z.transpose(1, 2))).transpose(1, 2)


def exponentials_per_second() -> float:
    """How many of the CPU kernel's exponentials all threads together compute, on data in the first-level cache."""
    import numpy as np
    from numba import njit

    from cobra.ops.backends.cpu.vector import LANES, exp2, load, store

    @njit(nogil=True)
    def kernel(values, out, repeats):
        for _ in range(repeats):
            for at in range(0, values.size, LANES):
                store(out, at, exp2(load(values, at)))

    def run(repeats: int) -> None:
        kernel(np.linspace(-10, 0, 1024, dtype=np.float32), np.empty(1024, np.float32), repeats)

    run(1)
    threads, repeats, best = torch.get_num_threads(), 20_000, 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(run, [repeats] * threads))
            best = max(best, threads * repeats * 1024 / (time.perf_counter() - start))
    return best


def least_milliseconds(function: Callable[[], object]) -> float:
    """The least time of at least two runs and at most 50, for about `SECONDS_PER_CASE`."""
    times: list[float] = []
    deadline = time.perf_counter() + SECONDS_PER_CASE
    while len(times) < 2 or (len(times) < 50 and time.perf_counter() < deadline):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def peak_mebibytes(function: Callable[[], object]) -> float | None:
    """By how much resident memory grows at most while the function runs; None where the system cannot tell."""
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


def measure(backend: str, scan: Scan, shape: tuple[int, int, int, int], rate: float) -> list[Row]:
    tensors = arguments(*shape)
    leaves = list(tensors.values())

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(**tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scan(**tensors).sum(), leaves)

    with torch.no_grad(), cobra.ops.use_backend("reference"):
        expected = cobra.ops.selective_scan(**tensors, delta_softplus=True)[0]
    agrees = torch.allclose(forward(), expected, rtol=1e-4, atol=1e-4)
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return [
        Row(
            backend=backend,
            shape=shape,
            passes=passes,
            milliseconds=least_milliseconds(function),
            floor=1e3 * exponentials * elements / rate,
            peak=peak_mebibytes(function),
            agrees=agrees,
        )
        for passes, function, exponentials in (("forward", forward, 1), ("forward+backward", both, 2))
    ]


def table(rows: list[Row]) -> str:
    lines = [f"{'backend':14} {'shape':20} {'passes':17} {'ms':>9} {'x cpu':>7} {'of floor':>9} {'peak MiB':>9}"]
    base = {(row.shape, row.passes): row.milliseconds for row in rows if row.backend == "cpu"}
    for row in rows:
        ratio = row.milliseconds / base[row.shape, row.passes] if base else float("nan")
        peak = "" if row.peak is None else f"{row.peak:.0f}"
        lines.append(
            f"{row.backend:14} {row.shape!s:20} {row.passes:17} {row.milliseconds:9.2f} {ratio:7.1f} "
            f"{row.floor / row.milliseconds:9.0%} {peak:>9}{'' if row.agrees else '  WRONG RESULT'}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also the loops over time on the large shape")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's choice by default")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    scans: dict[str, Scan] = {"cpu": ours("cpu")}
    if importlib.util.find_spec("mambapy"):
        scans["mambapy"] = mambapy_scan
    scans |= {"reference": ours("reference"), "transformers": transformers_scan}
    slow = {"reference", "transformers"}

    rate = exponentials_per_second()
    sys.stdout.write(f"{torch.get_num_threads()} threads, {rate / 1e9:.2f}e9 exponentials per second\n")
    rows: list[Row] = []
    for shape in SHAPES:
        for backend, scan in scans.items():
            if backend in slow and shape != SHAPES[0] and not options.slow:
                continue
            rows += measure(backend, scan, shape, rate)
    sys.stdout.write(table(rows) + "\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
