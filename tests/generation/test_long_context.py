"""A context of 100,000 tokens takes no more memory than a short one; work that nobody wants is let go."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import cobra
from cobra.generation.engine import decode
from cobra.generation.sampling import Sampling
from cobra.generation.scheduler import Request, Scheduler
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.models.vlm import CobraVLM
from cobra.text.tokenizer import Tokenizer

from .models import NO_END, make_lm, make_prompts, shaken

MEASURE = """
import resource, torch
from cobra.config import LLMConfig
from cobra.generation.engine import prefill
from cobra.generation.scheduler import Request, Scheduler
from cobra.models.mamba import MambaLM

lm = MambaLM(LLMConfig(d_model=64, num_layers=2, vocab_size=101, tokenizer="", prompt="mamba"))
lm.init_weights(torch.Generator().manual_seed(0))
lm.requires_grad_(False)
short, long = [7] * 4_000, [7] * 100_000

@torch.inference_mode()
def read_at_once(prompt, chunk):
    prefill(lm, [prompt], None, chunk=chunk)

def schedule(prompt, chunk):
    scheduler = Scheduler(lm, end_id=-5, chunk=chunk)
    scheduler.add(Request(prompt=prompt, max_new_tokens=2))
    while len(scheduler):
        scheduler.step()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, of all that was so far

for read, chunk in ((read_at_once, 1024), (schedule, 1024), (read_at_once, len(long))):
    read(short, chunk)
    before = peak()
    read(long, chunk)
    print(peak() - before)
"""


def test_a_long_context_takes_no_more_memory_than_a_short_one() -> None:
    """One activation of all 100,000 tokens alone has 98 MiB: 256 float32 numbers each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # of a process of its own
    output = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True
    )
    in_chunks, scheduled, whole = map(float, output.stdout.split())
    assert max(in_chunks, scheduled) < 8
    assert whole > 98  # the measurement sees it


class Watch:
    """Notes the states that a model has made."""

    def __init__(self, lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[weakref.ref[MambaState]] = []
        step = lm.step

        def watched(input_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
            hidden, after = step(input_ids, state)
            self.states.append(weakref.ref(after))
            return hidden, after

        monkeypatch.setattr(lm, "step", watched)

    def num_alive(self) -> int:
        gc.collect()
        return sum(state() is not None for state in self.states)


def test_closing_a_decoding_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    watch = Watch(lm, monkeypatch)
    steps = decode(lm, make_prompts(3, 4), None, max_new_tokens=50, end_id=NO_END, sampling=Sampling())
    for _ in range(3):
        next(steps)
    assert watch.num_alive() == 1 and len(watch.states) == 2
    steps.close()
    assert watch.num_alive() == 0
    assert list(steps) == [] and len(watch.states) == 2


def test_closing_a_stream_frees_it(
    small_model: CobraVLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaken(small_model.llm)
    vlm = cobra.Cobra(small_model.requires_grad_(False), tokenizer, "small")
    watch = Watch(small_model.llm, monkeypatch)
    pieces: Any = vlm.stream(None, "what is it?", temperature=8.0, max_new_tokens=50)
    for _ in range(3):
        next(pieces)
    assert watch.num_alive() == 1
    pieces.close()
    assert watch.num_alive() == 0


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_cancelling_an_answer_frees_it(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Whether it waits, is read or runs; its prefix goes, too."""
    lm = make_lm()
    watch = Watch(lm, monkeypatch)
    scheduler = Scheduler(lm, end_id=NO_END, chunk=4)
    state = lm(lm.embed(torch.tensor([[1, 2]])))[1]
    prefix = weakref.ref(state)
    ticket = scheduler.add(Request(prompt=make_prompts(9)[0], state=state, max_new_tokens=50))
    del state
    for _ in range(steps):
        scheduler.step()
    scheduler.cancel(ticket)
    gc.collect()
    assert len(scheduler) == 0 and prefix() is None and watch.num_alive() == 0
    assert scheduler.step() == []
