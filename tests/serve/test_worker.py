"""The order in which the worker takes jobs, and what becomes of it when something breaks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from PIL import Image

from cobra.api import Cobra
from cobra.generation.engine import prefill
from cobra.generation.sampling import Sampling
from cobra.generation.scheduler import CHUNK
from cobra.serve.worker import Delivery, Job, Piece, Update, Worker

TEXT = [5, 6, 7]


def job(*pieces: Piece, tokens: int = 3) -> Job:
    return Job(pieces=pieces, max_new_tokens=tokens, samplings=[Sampling()])


class Clients:
    """Text-only clients that ask again as soon as they are answered, until the jobs that are waited for are done."""

    def __init__(self, vlm: Cobra, *, rows: int, texts: int, waited_for: list[Job]) -> None:
        self.is_over = threading.Event()
        self.worker = Worker(vlm, max_rows=rows, deliver=self._on_delivery, on_failure=self.is_over.set)
        self.left = list(waited_for)
        self.num_texts = 0
        for _ in range(texts):
            self.worker.submit(job(TEXT))
        for one in waited_for:
            self.worker.submit(one)

    def _on_delivery(self, delivery: Delivery) -> None:
        for one, item in delivery:
            assert isinstance(item, Update)
            if one in self.left:
                self.left.remove(one)
            else:
                self.num_texts += 1
                self.worker.submit(job(TEXT))
        if not self.left or self.num_texts > 300:
            self.is_over.set()


@pytest.fixture
def pixels(vlm: Cobra) -> Any:
    return vlm.prepare_image(Image.new("RGB", (9, 9), "red"))


@pytest.mark.parametrize("texts", [2, 4])
def test_text_does_not_keep_images_out(vlm: Cobra, pixels: Any, texts: int) -> None:
    waited_for = [job(pixels, TEXT), job(TEXT, pixels, TEXT), job(pixels, pixels, TEXT)]
    clients = Clients(vlm, rows=2, texts=texts, waited_for=waited_for)
    clients.worker.start()
    assert clients.is_over.wait(60)
    clients.worker.stop()
    assert clients.left == []


def test_single_images_do_not_keep_several_out(vlm: Cobra, pixels: Any) -> None:
    """New jobs with one image come before every reading, and more of them than are read at once."""
    answered: list[Job] = []
    worker = Worker(
        vlm, max_rows=8, deliver=lambda delivery: answered.extend(one for one, _ in delivery), on_failure=int
    )
    late = job(TEXT, pixels, pixels, TEXT)
    worker.submit(late)
    for _ in range(20):
        for _ in range(5):
            worker.submit(job(pixels, TEXT))
        assert worker._take_orders()
        with torch.inference_mode():
            worker._read()
            worker._step()
    assert late in answered


def test_text_before_an_image_is_read_in_chunks(vlm: Cobra, pixels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def noted(llm: Any, prompts: list[list[int]], state: Any) -> Any:
        lengths.append(len(prompts[0]))
        return prefill(llm, prompts, state)

    long = [5 + i % 7 for i in range(CHUNK * 2 + 9)]
    worker = Worker(vlm, max_rows=2, deliver=lambda _: None, on_failure=int)
    worker.submit(job(long, pixels, TEXT))
    monkeypatch.setattr("cobra.serve.worker.prefill", noted)
    worker._take_orders()
    with torch.inference_mode():
        for _ in range(3):
            worker._read()
    [reading] = worker._reading
    assert [type(piece) for piece in reading.left] == [type(pixels), list]
    assert lengths == [CHUNK, CHUNK, 9]
    with torch.inference_mode():
        _, whole = vlm.model.llm(vlm.model.llm.embed(torch.tensor([long])))
    assert reading.state is not None
    torch.testing.assert_close(reading.state.ssm, whole.ssm)
