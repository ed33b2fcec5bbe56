"""A profile of a few steps: a trace for chrome://tracing or ui.perfetto.dev, and where the time goes on one screen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cobra.runtime import write_text

log = logging.getLogger(__name__)

WAIT, WARMUP = 2, 1  # steps before the first one that is recorded
_ROWS = 25  # of the summary


@contextmanager
def profiled(steps: int | None, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Give a function to call after each step; `steps` of them are recorded, after the first three of this start.

    Each rank writes `trace-rank0.json` and `summary-rank0.txt` (with its own number) into `folder`.
    """
    if steps is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    order = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"

    def write(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / f"trace-rank{rank}.json"))
        summary = found.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
        write_text(folder / f"summary-rank{rank}.txt", summary)
        log.info("%s\nProfile of %d steps: %s", summary, steps, folder)

    plan = schedule(wait=WAIT, warmup=WARMUP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler.step
