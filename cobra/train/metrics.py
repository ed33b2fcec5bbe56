"""What a step did, summed over the ranks, and the numbers that are logged of several steps."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from cobra.config import ModelConfig, ParallelConfig, TrainConfig
from cobra.data.batch import Batch
from cobra.describe.flops import training_flops
from cobra.describe.meta import build_on_meta, trace_image
from cobra.models.build import TRAINED_PARTS
from cobra.runtime import peak_memory_gib

# Dense bf16 matrix rate in TFLOP/s, from the makers' data sheets; the first name that the device's contains as a word
# of its own, or at the end of one ("GH200"), counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 5090": 209.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "RTX A6000": 155.0,
    "MI300X": 1307.0,
}


@dataclass
class Counts:
    """What the ranks do in one step; sums, so that they can be added up."""

    labels: float = 0.0  # tokens with loss
    rows: float = 0.0
    images: float = 0.0
    text_tokens: float = 0.0  # without padding
    positions: float = 0.0  # image and text tokens, padding included
    pads: float = 0.0  # units that only give a rank something to run
    bad: float = 0.0  # rows left out
    shared: float = 0.0  # micro-batches in which rows share an image
    failed: float = 0.0  # ranks that could not make their part of the batch
    wait_seconds: float = 0.0  # for data

    @classmethod
    def of(cls, batches: Sequence[Batch], image_tokens: int) -> Counts:
        """Count one rank's micro-batches."""
        counts = cls()
        for batch in batches:
            num_images = 0 if batch.pixels is None else len(batch.pixels[0])
            rows, longest = batch.input_ids.shape
            counts.labels += batch.num_labels
            counts.rows += len(batch.ids)
            counts.images += num_images - batch.num_pads if num_images else 0
            counts.text_tokens += int(batch.lengths.sum()) - batch.num_pads  # a pad has one token
            counts.positions += rows * longest + num_images * image_tokens
            counts.pads += batch.num_pads
            counts.bad += len(batch.bad)
            counts.shared += batch.image_index is not None
        return counts

    def values(self) -> list[float]:
        """All numbers, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def tokens(self, image_tokens: int) -> int:
        """Image and text tokens, without padding."""
        return int(self.images) * image_tokens + int(self.text_tokens)


class Flops:
    """Floating-point operations of training: the forward and backward passes that the stage needs, nothing twice."""

    def __init__(self, config: ModelConfig, train: TrainConfig) -> None:
        """Count them from the config alone."""
        image, parts = trace_image(build_on_meta(config)), TRAINED_PARTS[train.stage]
        # linear in the number of text tokens
        none, one = (
            sum(p.total for p in training_flops(config.llm, image, n, parts, train.lora).values()) for n in (0, 1)
        )
        self.image, self.text_token = none, one - none

    def of(self, counts: Counts) -> float:
        """Return the FLOPs of a step, padding not counted."""
        return counts.images * self.image + counts.text_tokens * self.text_token


def peak_flops(config: ParallelConfig, device: torch.device) -> float | None:
    """FLOP/s that one device can reach in the run's precision: as given, or known; None: nobody knows."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda" or config.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for known, peak in PEAK_TFLOPS.items() if re.search(rf"{known}\b", name)), None)


class Window:
    """Sums between two log lines."""

    def __init__(self, flops: Flops, peak: float | None, world_size: int, image_tokens: int) -> None:
        """Take the FLOPs of a step, FLOP/s of a device (None: unknown), the number of ranks, and tokens per image."""
        self.flops, self.image_tokens, self.world_size = flops, image_tokens, world_size
        self.peak = None if peak is None else peak * world_size
        self._reset()

    def _reset(self) -> None:
        self.started, self.losses, self.total, self.done_flops = time.perf_counter(), list[float](), Counts(), 0.0

    def add(self, counts: Counts, loss: float | None) -> None:
        """Count a step; its loss is None when it was skipped."""
        if loss is not None:
            self.losses.append(loss)
        self.total = Counts(*(a + b for a, b in zip(self.total.values(), counts.values(), strict=True)))
        self.done_flops += self.flops.of(counts)

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on training, such as validation."""
        self.started += seconds

    def close(self, device: torch.device) -> dict[str, float | None]:
        """Return the numbers of the window and start the next one. Rates are sums over all ranks."""
        seconds, total = time.perf_counter() - self.started, self.total
        tokens = total.tokens(self.image_tokens)
        metrics: dict[str, float | None] = {
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "examples_per_second": total.rows / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": None if self.peak is None else self.done_flops / seconds / self.peak,
            "padding_fraction": 1 - tokens / max(1.0, total.positions),
            "data_wait_fraction": min(1.0, total.wait_seconds / self.world_size / seconds),
            "pads": total.pads,
            "memory_gib": peak_memory_gib(device),
        }
        self._reset()
        return metrics


def line(metrics: dict[str, float | None]) -> str:
    """The part of the progress line that the metrics fill."""
    parts = [
        "loss -" if metrics["loss"] is None else f"loss {metrics['loss']:.4f}",
        f"lr {metrics['lr']:.2e}",
        f"{metrics['examples_per_second']:,.0f} examples/s",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        None if metrics["mfu"] is None else f"MFU {100 * metrics['mfu']:.1f} %",
        f"{metrics['memory_gib']:.1f} GiB",
    ]
    return " | ".join(part for part in parts if part) + " | "
