"""Latency, tokens per second and memory of generation, Cobra beside its peers, in one run and with random weights.

    python benchmarks/inference.py                                  # Mamba 130M, float32, on the CPU
    python benchmarks/inference.py --size 2.8b --dtype bfloat16     # Cobra-3B's language model, on a GPU
    python benchmarks/inference.py --protocol cobra-3b              # and the paper's protocol, image included

For each batch, prompt length and number of new tokens: `first` is the time to the first token, `tokens/s` what the
whole batch gets per second after it, and `of limit` how near that is to the time that reading all weights once, and
reading (a Mamba also writing) each row's memory, takes at the bandwidth measured in the same rounds, `GB/s`: PyTorch's
sum over a block of --gigabytes. Then the same for the plots of --contexts: tokens/s, and the bytes that a row's memory
has, against context length.
`peak` is the largest amount of device memory that a call takes beside the weights (on a CPU: by how much the process
grows, each model and case in a process of its own; below some megabytes that says nothing).

Models take turns within rounds, and everything is a median over the rounds, after one that does not count: other users
of a machine slow all of them alike. `x` compares with transformers' Mamba. `same` is the
share of a Mamba's greedy tokens that equal those of transformers' before the first difference in each row; quantised
weights are others, and random ones decide narrowly.

The paper's protocol (section 4.3): one image, "Describe the image specifically", 256 new tokens, from the image's
encoding to the last token.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from inference_subjects import SIZES, Subject, subjects
from matplotlib.figure import Figure
from torch import Tensor

from cobra.runtime import pick_device

matplotlib.use("Agg")

REFERENCE = "transformers Mamba"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one case; seconds, bytes."""

    name: str
    batch: int
    prompt: int
    new: int
    first: float
    tokens_per_second: float
    of_limit: float
    gigabytes_per_second: float  # at which memory was read between the runs
    same: float | None
    peak: int | None = None


def machine(device: torch.device) -> str:
    """What was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())} ({torch.get_num_threads()} threads)"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def prompts(batch: int, length: int, vocab_size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100_003 + length)
    return torch.randint(vocab_size, (batch, length), generator=generator).to(device)


def nothing() -> None:
    """Called where nobody looks at the clock."""


def timed(model: Subject, ids: Tensor, new: int) -> tuple[float, float]:
    """Seconds to the first token, and from it to the last."""
    marks: list[float] = []

    def mark() -> None:
        synchronize(ids.device)
        marks.append(time.perf_counter())

    mark()
    model.generate(ids, new, mark)
    mark()
    start, first, end = marks
    return first - start, end - first


def case(models: Sequence[Subject], ids: Tensor, new: int, block: Tensor, rounds: int) -> list[Row]:
    """All models on the same prompts.

    Memory is read in every round as well: others on the machine take their share of it from minute to minute.
    """
    device, (batch, length) = ids.device, ids.shape
    reading: list[float] = []
    answers = {model.name: model.generate(ids, new, nothing) for model in models}  # compiles and fills caches as well
    expected = answers.get(REFERENCE)
    times: dict[str, list[tuple[float, float]]] = {model.name: [] for model in models}
    for _ in range(rounds):
        block.sum()
        reading.append(seconds(block.sum, device))
        for model in models:
            times[model.name].append(timed(model, ids, new))
    speed = block.nbytes / statistics.median(reading)
    rows: list[Row] = []
    for model in models:
        first = statistics.median(first for first, _ in times[model.name])
        step = statistics.median(rest for _, rest in times[model.name]) / (new - 1)
        comparable = expected is not None and model.row_bytes(1) == model.row_bytes(2)  # a Mamba
        rows.append(
            Row(
                name=model.name, batch=batch, prompt=length, new=new, first=first, tokens_per_second=batch / step,
                of_limit=model.step_bytes(batch, length + new // 2) / speed / step, gigabytes_per_second=speed / 1e9,
                same=_same(answers[model.name], expected) if comparable and expected is not None else None,
            )
        )  # fmt: skip
    return rows


def _same(found: Tensor, expected: Tensor) -> float:
    """Share of tokens before the first difference in each row."""
    return (found == expected).long().cumprod(1).double().mean().item()


def peak_bytes(options: argparse.Namespace, name: str, batch: int, prompt: int, new: int) -> int | None:
    """Run one case in a process of its own; None if it fails there."""
    child = [
        sys.executable, __file__, "--child", name, "--size", options.size, "--dtype", options.dtype,
        "--device", options.device, "--quantize", *options.quantize, "--batches", str(batch), "--prompts", str(prompt),
        "--new-tokens", str(new),
    ]  # fmt: skip
    child += ["--threads", str(options.threads)] if options.threads else []
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    print(f"no peak of {name}: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    return None


def _measure_peak(options: argparse.Namespace, device: torch.device) -> int:
    """What a call takes beside the weights, in this process."""
    dtype = getattr(torch, options.dtype)
    model = next(m for m in subjects(options.size, device, dtype, options.quantize, only=options.child))
    ids = prompts(options.batches[0], options.prompts[0], SIZES[options.size].mamba.vocab_size, device)
    model.generate(ids[:, :2], 2, nothing)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model.generate(ids, options.new_tokens[0], nothing)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux alone has that)
    before = _peak_of_process()
    model.generate(ids, options.new_tokens[0], nothing)
    return _peak_of_process() - before


def _peak_of_process() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The paper's protocol: an image, a question, `new` tokens; the median."""

    model: str
    new: int
    seconds: float
    tokens_per_second: float
    of_limit: float


def protocol(name: str, device: torch.device, dtype: str, block: Tensor, rounds: int) -> Protocol:
    """Time it with random weights. The limit is reading the language model's weights once per token."""
    from evaluation import shapes
    from PIL import Image

    model = shapes(name, str(device), dtype)
    model.tokenizer.end_id = -2  # no answer ends before its limit
    image = Image.effect_noise((640, 480), 64).convert("RGB")
    ask = "Describe the image specifically"
    model.generate(image, ask, max_new_tokens=8)
    times = [
        (seconds(block.sum, device), seconds(lambda: model.generate(image, ask, max_new_tokens=256), device))
        for _ in range(rounds)
    ]
    speed = block.nbytes / statistics.median(reading for reading, _ in times)
    whole = statistics.median(time for _, time in times)
    limit = 256 * sum(parameter.nbytes for parameter in model.model.llm.parameters()) / speed
    return Protocol(model=name, new=256, seconds=whole, tokens_per_second=256 / whole, of_limit=limit / whole)


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'model':22} {'batch':>5} {'prompt':>6} {'new':>4} {'first ms':>9} {'x':>6} {'tokens/s':>9} {'x':>6} "
        f"{'GB/s':>6} {'of limit':>8} {'peak MB':>8} {'same':>7}"
    ]
    for row in rows:
        peers = (
            o for o in rows if o.name == REFERENCE and (o.batch, o.prompt, o.new) == (row.batch, row.prompt, row.new)
        )
        peer = next(peers, None)
        faster = (peer.first / row.first, row.tokens_per_second / peer.tokens_per_second) if peer else (None, None)
        lines.append(
            f"{row.name:22} {row.batch:5} {row.prompt:6,} {row.new:4} {1e3 * row.first:9.1f} {_times(faster[0])} "
            f"{row.tokens_per_second:9.1f} {_times(faster[1])} {row.gigabytes_per_second:6.1f} {row.of_limit:8.0%} "
            f"{'-' if row.peak is None else f'{row.peak / 1e6:,.0f}':>8} "
            f"{'-' if row.same is None else f'{row.same:.1%}':>7}"
        )
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return f"{'-' if ratio is None else f'{ratio:.2f}':>6}"


def plot(rows: Sequence[Row], models: Sequence[Subject], file: Path) -> None:
    """Tokens/s, and bytes that a row's memory has, against context length."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    contexts = sorted({row.prompt for row in rows})
    remembered: dict[tuple[int, ...], str] = {}
    for model in models:
        speeds = {row.prompt: row.tokens_per_second for row in rows if row.name == model.name}
        left.plot(contexts, [speeds[context] for context in contexts], marker="o", label=model.name)
        known = remembered.get(kept := tuple(model.row_bytes(context) for context in contexts))
        remembered[kept] = model.name if known is None else "every Mamba"  # their states are alike
    for kept, name in remembered.items():
        right.plot(contexts, [number / 1e6 for number in kept], marker="o", label=name)
    for axes, label in ((left, "tokens per second, batch 1"), (right, "megabytes that one row remembers")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", nargs="*", choices=("int8", "int4"), default=["int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 800])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32])
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[128, 512, 2048], help="of the plots; none: no plots"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of the block that bandwidth is measured with")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's choice by default")
    parser.add_argument("--no-peers", action="store_true", help="Cobra alone")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peaks")
    parser.add_argument("--protocol", metavar="MODEL", help="a name in configs/model: the paper's protocol as well")
    parser.add_argument("--out", type=Path, default=Path("results/inference"), help="inference.json, inference.png")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.new_tokens) < 2:
        parser.error("--new-tokens must be at least 2: time per token is counted after the first one")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if options.child:
        print(_measure_peak(options, device))
        return

    dtype = getattr(torch, options.dtype)
    block = torch.zeros(int(options.gigabytes * 1e9 / 4), device=device)
    about = f"{options.size} {options.dtype} on {machine(device)}, torch {torch.__version__}"
    print(about, flush=True)
    models = subjects(options.size, device, dtype, options.quantize, with_peers=not options.no_peers)
    vocab_size = SIZES[options.size].mamba.vocab_size
    rows: list[Row] = []
    for batch in options.batches:
        for length in options.prompts:
            for new in options.new_tokens:
                found = case(models, prompts(batch, length, vocab_size, device), new, block, options.rounds)
                if not options.no_memory:
                    found = [replace(row, peak=peak_bytes(options, row.name, batch, length, new)) for row in found]
                rows += found
    print(table(rows), flush=True)
    curves: list[Row] = []
    for context in options.contexts:
        curves += case(models, prompts(1, context, vocab_size, device), 16, block, max(2, options.rounds // 2))
    options.out.mkdir(parents=True, exist_ok=True)
    if curves:
        print(table(curves))
        plot(curves, models, options.out / "inference.png")
    result: dict[str, object] = {"machine": about, "rows": [asdict(row) for row in [*rows, *curves]]}
    if options.protocol:
        found = protocol(options.protocol, device, options.dtype, block, options.rounds)
        print(f"{found.model}: image and {found.new} tokens in {found.seconds:.2f} s, "
              f"{found.tokens_per_second:.1f} tokens/s, {found.of_limit:.0%} of the limit")  # fmt: skip
        result["protocol"] = asdict(found)
    (options.out / "inference.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.out / 'inference.json'}" + (f", {options.out / 'inference.png'}" if curves else ""))


if __name__ == "__main__":
    main()
