"""A description as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cobra.describe import Description


def table(found: Description) -> str:
    """Return all numbers of a description in blocks, lines of at most 120 characters."""
    flops = found.training_flops
    forward, backward = (sum(getattr(part, key) for part in flops.values()) for key in ("forward", "backward"))
    memories, parallel = found.memories, found.parallel
    columns = [f"recompute={_value(key)}" + (" (set)" if key == parallel.recompute else "") for key in memories]
    memory_rows = {
        "weights": "weights",
        f"gathered or cast weights ({parallel.precision})": "copies",
        "gradients": "gradients",
        "AdamW's two moments": "optimizer",
        "activations": "activations",
        "total": "total",
    }
    gpus = f"{found.world_size} GPU{'s' if found.world_size > 1 else ''}"
    lines = [
        f"{found.name}, stage {found.stage}",
        "",
        *_block(
            "Parameters",
            *((part.name, _short(part.parameters), "trained" if part.is_trained else "frozen") for part in found.parts),
            ("total", _short(found.parameters), f"{_short(found.trained_parameters)} trained"),
        ),
        *_block(
            "Sequence",
            ("image tokens", f"{found.image_tokens:,}"),
            ("text tokens of an example (assumed)", f"{found.text_tokens:,}"),
            ("Mamba state of a row, fp32", f"{_short(found.state_bytes)}B = {found.state_formula}"),
        ),
        *_block(
            "FLOPs of one training example (one image, one text; head at every text token)",
            ("", "forward", "backward", "both"),
            *((name, *map(_short, (part.forward, part.backward, part.total))) for name, part in flops.items()),
            ("total", *map(_short, (forward, backward, forward + backward))),
        ),
        *_block("FLOPs of one generated token", ("llm", _short(found.decoding_flops))),
        *_block(
            f"Training memory per GPU, {gpus} (estimate)",
            ("", *columns),
            *(
                (label, *(f"{_short(getattr(memory, key))}B" for memory in memories.values()))
                for label, key in memory_rows.items()
            ),
        ),
        *_assumptions(found),
        "",
        *_block(
            f"Limit of decoding, batch 1, bf16: {_short(found.decoding_bytes)}B per token (weights; state, both ways)",
            *((gpu, f"{limit:,.0f} tokens/s") for gpu, limit in found.decoding_limits.items()),
        ),
    ]
    return "\n".join(lines)


def _assumptions(found: Description) -> list[str]:
    """What the estimate of memory takes for granted."""
    parallel, batch = found.parallel, f"{found.rows} images"
    if found.rows_per_image > 1:
        batch += f" with {found.rows_per_image} texts each"
    keys = ["precision"]
    if found.world_size > 1:
        keys += ["reshard", "replicate", "shard_frozen", "defer_gradient_sync"]
    settings = ", ".join(f"{key}={_value(getattr(parallel, key))}" for key in keys)
    return [
        f"  With the config's parallel: {settings};",
        f"  a micro-batch of {batch}, {found.text_tokens} text tokens each. What learns is fp32, with two moments.",
        "  Left out: what passes through frozen towers, the allocator's gaps, the CUDA context.",
    ]


def _value(value: object) -> str:
    """A setting as it is typed."""
    return "null" if value is None else str(value).lower()


def _block(title: str, *rows: tuple[str, ...]) -> list[str]:
    """Lines of a title and its rows: the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ("  ".join(["", row[0].ljust(max(first, 44)), *map(str.rjust, row[1:], others)]).rstrip() for row in rows)
    return [title, *lines, ""]


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 3,548,000,000 -> "3.55 G"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{max(0, 2 - math.floor(math.log10(number / size)))}f} {prefix}"
    return f"{number:.0f} "
