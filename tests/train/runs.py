"""What tests of training read of a run folder, and how they disturb a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cobra.config import TrainConfig
from cobra.models.sharded import SafeReader, read_into
from cobra.ranks import Ranks
from cobra.train import checkpoint
from cobra.train.checkpoint import Progress, Saver
from cobra.train.optim import learning_rate
from cobra.train.trackers import read_metrics

Fit = Callable[..., Path]


def weights(run_folder: Path) -> dict[str, Tensor]:
    """The exported model."""
    return load_file(run_folder / "model" / "model.safetensors")


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def rows(run_folder: Path) -> list[dict[str, Any]]:
    return read_metrics(run_folder / "metrics.jsonl")


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in rows(run_folder)]


def state(folder: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds: parameters, moments, random state."""
    reader = SafeReader(folder)
    found = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in found.items()}
    read_into(tensors, reader, is_alone=True)
    return tensors


def steps_of(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints in a folder, which holds nothing else but `latest`."""
    names = sorted(path.name for path in checkpoints.iterdir() if path.name != "latest")
    return [int(name.removeprefix("step-")) for name in names]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int | set[int], action: Callable[[], Any]) -> None:
    """Call `action` at the beginning of one or several steps, which are counted from 0."""
    steps = {step} if isinstance(step, int) else step

    def rate(now: int, num_steps: int, config: TrainConfig) -> float:
        if now in steps:
            action()
        return learning_rate(now, num_steps, config)

    monkeypatch.setattr("cobra.train.trainer.learning_rate", rate)


def interrupt_after_second_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail with KeyboardInterrupt as soon as the run's second checkpoint is complete."""
    save, calls = Saver.save, []

    def saved(self: Saver, *args: Any) -> None:
        save(self, *args)
        calls.append(1)
        if len(calls) == 2:
            assert self.finish()
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save", saved)


class Small:
    """Two linear layers with an optimizer that has stepped, and their checkpoints."""

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.saver = Saver(folder, Ranks(), keep=keep, keep_every=keep_every)
        self.learn()

    def learn(self) -> None:
        self.model(torch.ones(8)).sum().backward()
        self.optimizer.step()

    def save(self, step: int) -> None:
        self.saver.save(Progress(step=step, tokens=10 * step, data="rows"), self.model, self.optimizer)

    def load(self, folder: Path) -> Progress:
        return checkpoint.load(folder, self.model, self.optimizer, Ranks())

    def parameters(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
