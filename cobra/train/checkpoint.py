"""Training state on disk: sharded, written in the background, and complete or not there at all.

checkpoints/step-000500/*.distcp, .metadata   torch.distributed.checkpoint: parameters, optimizer moments, random states
checkpoints/step-000500/state.json            step and counters
checkpoints/latest                            the name of the newest complete checkpoint

A checkpoint is written under a temporary name and renamed when every rank has done its part, so a kill at any moment
leaves a good one behind. It can be read at any number of ranks.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from cobra.errors import CheckpointError
from cobra.models.sharded import FAILURES, SafeReader, expect_to_be_alone, read_into, reason
from cobra.models.weights import untied_state
from cobra.ranks import Ranks
from cobra.runtime import flush_to_disk, write_text

log = logging.getLogger(__name__)

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
TEMPORARY = ".tmp"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is. The sampler's position is the step itself: batches are a function of (seed, step)."""

    step: int = 0  # steps done
    tokens: int = 0  # text and image tokens read
    seconds: float = 0.0  # of training, over all starts
    skipped: int = 0  # steps without an update, as loss or gradient was not finite
    bad_examples: int = 0  # rows left out
    data: str = ""  # digest of the rows that are trained on


class Saver:
    """Writes checkpoints of one run while training goes on. All ranks call the same methods in the same order."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, keep_every: int | None) -> None:
        """Take the folder of the checkpoints, how many of the newest stay, and steps whose multiples stay for good."""
        self.folder, self.ranks, self.keep, self.keep_every = folder, ranks, keep, keep_every
        expect_to_be_alone()
        self._running: tuple[Progress, Future[Any]] | None = None
        self.last_step = 0  # of the newest checkpoint that was begun
        if ranks.is_first:
            for left_over in folder.glob(f"*{TEMPORARY}"):  # of a run that was killed while it wrote
                shutil.rmtree(left_over, ignore_errors=True)

    def save(self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state to the host and start to write it; an earlier one is finished first."""
        self.finish()
        temporary = self._temporary(progress)
        if self.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        try:
            future = async_save(
                _collect(model, optimizer, self.ranks.rank),
                storage_writer=FileSystemWriter(temporary),
                process_group=self.ranks.host_group,
                no_dist=self.ranks.world_size == 1,
            )
        except FAILURES as error:
            future = Future()
            future.set_exception(error)
        assert isinstance(future, Future)
        self._running, self.last_step = (progress, future), progress.step

    def poll(self) -> None:
        """Publish the checkpoint that is being written, if it is complete by now."""
        if self._running is not None and self._running[1].done():
            self.finish()

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written and publish it; return whether none has failed.

        A failure is no reason to stop training: it is logged, and the last good checkpoint stays where it is.
        """
        if self._running is None:
            return True
        progress, future = self._running
        self._running = None
        try:
            future.result()
            if self.ranks.is_first:
                self._publish(progress)
        except FAILURES as error:  # whatever went wrong on whichever rank, a full disk above all
            if self.ranks.is_first:
                shutil.rmtree(self._temporary(progress), ignore_errors=True)
            log.error(
                "The checkpoint of step %d could not be written (%s). Training goes on; the last good one is %s. "
                "Is the disk of %s full?",
                progress.step,
                reason(error),
                latest(self.folder),
                self.folder,
            )
            return False
        return True

    def _temporary(self, progress: Progress) -> Path:
        return self.folder / f"step-{progress.step:06d}{TEMPORARY}"

    def _publish(self, progress: Progress) -> None:
        """Give a complete checkpoint its name, point `latest` to it, and remove what need not stay."""
        temporary = self._temporary(progress)
        target = temporary.with_suffix("")
        (temporary / "state.json").write_text(json.dumps(vars(progress)) + "\n")
        flush_to_disk(temporary / "state.json")
        replaced = target.with_name(f"{target.name}.old{TEMPORARY}")
        if target.exists():  # the same step once more: it may be the last good one, and to remove it takes time
            target.rename(replaced)
        temporary.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        write_text(self.folder / "latest", target.name + "\n")
        # One of a later step is left over from before the run went back; it must not push this one out.
        complete = [path for path in self.folder.iterdir() if 0 < _step(path) <= progress.step]
        for old in sorted(complete, key=_step)[: -self.keep]:
            if self.keep_every is None or _step(old) % self.keep_every:
                shutil.rmtree(old)


def _step(path: Path) -> int:
    """The step of a checkpoint by its name; 0 for anything else."""
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found.group(1)) if found else 0


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None when the run has none yet."""
    pointer = folder / "latest"
    return folder / pointer.read_text().strip() if pointer.is_file() else None


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Progress:
    """Put a checkpoint back into the model, the optimizer and this rank's random generators.

    At another number of ranks than it was written with, the ranks that are new keep the random state they have.

    Raises:
        CheckpointError: it is damaged or belongs to another model; nothing is silently skipped.
    """
    remedy = f"Delete {checkpoint} and write the name of an older checkpoint into {checkpoint.parent / 'latest'}, or "
    remedy += "delete the run folder to start anew."
    try:
        progress = Progress(**json.loads((checkpoint / "state.json").read_text()))
        reader = SafeReader(checkpoint)
        stored = set(reader.read_metadata().state_dict_metadata)
        wanted = {f"model.{name}": tensor for name, tensor in untied_state(model).items()}
        wanted |= _optimizer_state(model, optimizer, stored)
        _check(stored, set(wanted), checkpoint)
        random = {key: torch.empty_like(value) for key, value in _random_state(ranks.rank).items() if key in stored}
        state = wanted | random
        read_into(state, reader, is_alone=ranks.world_size == 1)
    except CheckpointError:
        raise
    except FAILURES as error:  # a damaged file shows in many ways
        raise CheckpointError(f"The checkpoint {checkpoint} is damaged: {reason(error)}. {remedy}") from None
    if f"rng.cpu.{ranks.rank}" in random:
        torch.set_rng_state(random[f"rng.cpu.{ranks.rank}"])
    if f"rng.cuda.{ranks.rank}" in random:
        torch.cuda.set_rng_state(random[f"rng.cuda.{ranks.rank}"])
    return progress


def _collect(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in untied_state(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors | _random_state(rank)


def _random_state(rank: int) -> dict[str, Tensor]:
    state = {f"rng.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: set[str]) -> dict[str, Tensor]:
    """Make room in the optimizer for the state that the checkpoint has, and return it by name."""
    wanted: dict[str, Tensor] = {}
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        # none: it has had no gradient yet, such as blocks behind the one that features are taken from
        if parameter in trained and any(f"optimizer.{name}.{key}" in stored for key in ADAMW_STATE):
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)  # as fused AdamW keeps it
            moments = {key: torch.zeros_like(parameter.detach()) for key in ADAMW_STATE[1:]}
            optimizer.state[parameter] = {"step": step} | moments
            wanted |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return wanted


def _check(stored: set[str], wanted: set[str], checkpoint: Path) -> None:
    stored = {key for key in stored if not key.startswith("rng.")}
    problems = [
        f"{what}: {', '.join(sorted(names)[:4])}{' ...' if len(names) > 4 else ''} ({len(names)})"
        for what, names in (("missing", wanted - stored), ("unexpected", stored - wanted))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint} does not fit the model and what this stage trains: {'; '.join(problems)}. Was it written "
            "with another config?"
        )
