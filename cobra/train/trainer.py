"""The training loop, and nothing else."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from cobra.config import PretrainConfig
from cobra.data.batch import Batch
from cobra.errors import CTRL_C, STOPPED_EARLY, CheckpointError, DataError, Interrupted, NumericsError
from cobra.models.vlm import CobraOutput, CobraVLM
from cobra.ranks import Ranks
from cobra.train import checkpoint
from cobra.train.checkpoint import Progress, Saver
from cobra.train.metrics import Counts, Flops, Window, line, peak_flops
from cobra.train.optim import learning_rate
from cobra.train.parallel import autocasts, full, local, sync_gradients
from cobra.train.profiling import profiled
from cobra.train.stopping import StopRequest, stop_signals
from cobra.train.trackers import Tracker

log = logging.getLogger(__name__)

BAD_EXAMPLES_FILE = "bad_examples.jsonl"

Validate = Callable[[], dict[str, float]]


class Trainer:
    """Runs steps until the last one; saves, logs, validates and stops as configured. All ranks do the same."""

    def __init__(
        self,
        config: PretrainConfig,
        model: CobraVLM,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        run_folder: Path,
        progress: Progress,
        num_steps: int,
    ) -> None:
        """Take the parts; `progress` is where the run begins, before `resume`."""
        train = config.train
        self.config, self.ranks, self.run_folder = config, ranks, run_folder
        self.model, self.optimizer = model, optimizer
        self.progress, self.num_steps = progress, num_steps
        self.checkpoints = run_folder / "checkpoints"
        self.saver = Saver(self.checkpoints, ranks, keep=train.keep_checkpoints, keep_every=train.keep_every)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.image_tokens = model.num_image_tokens
        self.skipped_in_a_row = 0
        self.has_stopped = False  # before the last step, as all ranks have agreed

    def resume(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        found = checkpoint.latest(self.checkpoints)
        name = self.ranks.agree(None if found is None else found.name)  # another machine may still see an older one
        if name is not None:
            newest = self.checkpoints / name
            progress = checkpoint.load(newest, self.model, self.optimizer, self.ranks)
            if progress.data != self.progress.data:
                problem = f"{newest} was trained on other rows than data.annotations holds now."
                if self.config.resume != "anyway":
                    raise CheckpointError(
                        f"{problem} Give it the same file, or choose another run.name. resume=anyway goes on with them."
                    )
                log.warning("%s Going on with the new ones.", problem)
            self.progress = replace(progress, data=self.progress.data)
            log.info("Resuming from %s.", newest)

    def fit(
        self,
        steps: Iterator[list[Batch]],
        trackers: list[Tracker],
        *,
        stop: StopRequest,
        validate: Validate | None = None,
    ) -> None:
        """Train on `steps`, this rank's part of the global batches from `progress.step` on.

        Raises:
            Interrupted: after a signal or at the time limit, once the step is finished and saved.
            DataError: an image or row is bad; what was learnt before is saved.
            NumericsError: `train.max_skipped_steps` steps in a row gave a loss or gradient that is not finite, or a
                parameter is not. No update from it has been made, nor such parameters been saved.
        """
        train, device = self.config.train, self.model.device
        flops = Flops(self.config.model, train)
        peak = peak_flops(self.config.parallel, device)
        window = Window(flops, peak, self.ranks.world_size, self.image_tokens)
        bar = tqdm(
            total=self.num_steps,
            initial=self.progress.step,
            unit="step",
            disable=not (log.isEnabledFor(logging.INFO) and self.ranks.is_first),
            mininterval=0.5 if sys.stderr.isatty() else 15,
            bar_format="step {n_fmt}/{total_fmt} | {desc}{elapsed} gone, {remaining} left",
        )
        self._set_modes()
        profile_folder = self.run_folder / "profile"
        with bar, stop_signals(stop), profiled(train.profile, profile_folder, self.ranks.rank) as profile_step:
            first = self.progress.step
            try:
                while self.progress.step < self.num_steps:
                    batches, counts = self._next(steps)
                    loss, grad_norm, exit_code = self._step(batches, counts, stop)
                    if self.progress.step == first + 1:
                        bar.unpause()  # compiling kernels takes long, and says nothing about the time that is left
                    window.add(counts, loss)
                    profile_step()
                    is_last = self.progress.step == self.num_steps
                    if self.progress.step % train.log_every == 0 or is_last:
                        self._log(window, grad_norm, trackers, bar)
                    bar.update()
                    self.saver.poll()
                    is_stopping = bool(exit_code) and not is_last
                    if validate is not None and self._is_due(self.config.validation.every) and not is_stopping:
                        self._validate(validate, window, trackers)  # before saving: a kill in between repeats it
                    if self.progress.step % train.save_every == 0 or is_last or is_stopping:
                        self.save()
                    if is_stopping:
                        self._stop(exit_code)
            except Exception:
                self.saver.finish()  # a checkpoint that is being written is a good one
                raise
        self.saver.finish()

    def _validate(self, validate: Validate, window: Window, trackers: list[Tracker]) -> None:
        started = time.perf_counter()
        found = validate()
        self._set_modes()
        for tracker in trackers:
            tracker.log({"step": self.progress.step} | found)
        window.exclude(time.perf_counter() - started)

    def _set_modes(self) -> None:
        """A frozen encoder has no drop path. The rest trains: gradients pass through a frozen language model, too.

        Blocks recompute only when they train (`parallel.recompute`).
        """
        self.model.train()
        self.model.vision.train(any(parameter.requires_grad for parameter in self.model.vision.parameters()))

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.progress.step % every == 0 or self.progress.step == self.num_steps)

    def _next(self, steps: Iterator[list[Batch]]) -> tuple[list[Batch], Counts]:
        """Return this rank's micro-batches, and what all ranks have; they stop together if one has none."""
        started, problem = time.perf_counter(), None
        batches: list[Batch] = []
        try:
            batches = next(steps)
        except DataError as error:
            problem = str(error)
        counts = Counts.of(batches, self.image_tokens)
        counts.wait_seconds, counts.failed = time.perf_counter() - started, float(problem is not None)
        counts = Counts(*self.ranks.sum(counts.values()))
        if counts.failed:
            problems = [found for found in self.ranks.gather(problem) if found is not None]
            self._save_before_leaving()
            raise DataError(problems[0])
        if counts.bad:
            self._note_bad_examples(batches)
        if counts.labels == 0:  # rows without answers were left out when the data was opened
            self._save_before_leaving()
            raise DataError(
                f"Step {self.progress.step + 1}: no image of the whole batch can be read, see "
                f"{self.run_folder / BAD_EXAMPLES_FILE}. Is the image folder still there?"
            )
        if counts.shared:
            # Then the model reads images and texts in two passes. All ranks do, or they would gather parameters in
            # different orders and wait for each other for ever.
            batches = [batch.indexed() for batch in batches]
        return batches, counts

    def _step(self, batches: list[Batch], counts: Counts, stop: StopRequest) -> tuple[float | None, float, int]:
        """Make one update from a global batch.

        Returns:
            The loss (mean over all labelled tokens of all ranks; None if it or the gradient is not finite and the
            update was therefore skipped), the gradient norm, and the exit code that some rank has been asked to leave
            with (0: none).
        """
        started = time.perf_counter()
        train, step, ranks = self.config.train, self.progress.step, self.ranks
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.num_steps, train)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for i, batch in enumerate(batches):
            sync_gradients(self.model, i == len(batches) - 1 or not self.config.parallel.defer_gradient_sync)
            try:
                output = self._forward(batch.to(self.model.device))
            except NumericsError as error:  # of a parameter, found before there is a loss
                raise self._diverged(step + 1, f"{str(error).rstrip('.')}. The update was not made") from error
            assert output.loss_sum is not None  # the batch has labels
            total += output.loss_sum.detach()
            # Sharding takes the mean of the ranks' gradients, so each rank's loss counts world_size times.
            (output.loss_sum * (ranks.world_size / counts.labels)).backward()
        grad_norm = float(full(torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)))
        code = stop.exit_code
        loss_sum, ctrl_c, stopped = ranks.sum([float(total), float(code == CTRL_C), float(code > 0)])
        loss: float | None = loss_sum / counts.labels
        is_finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        if is_finite:
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._skip(batches, loss_sum / counts.labels, grad_norm)
            loss = None
        self.optimizer.zero_grad(set_to_none=True)
        self.progress = replace(
            self.progress,
            step=step + 1,
            tokens=self.progress.tokens + counts.tokens(self.image_tokens),
            seconds=self.progress.seconds + time.perf_counter() - started,
            skipped=self.progress.skipped + (not is_finite),
            bad_examples=self.progress.bad_examples + int(counts.bad),
        )
        return loss, grad_norm, CTRL_C if ctrl_c else STOPPED_EARLY if stopped else 0

    def _forward(self, batch: Batch) -> CobraOutput:
        is_mixed = autocasts(self.config.parallel, self.model)
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=is_mixed):
            return self.model(
                batch.input_ids,
                pixels=batch.pixels,
                labels=batch.labels,
                image_index=batch.image_index,
                lengths=batch.lengths,
            )

    def _skip(self, batches: list[Batch], loss: float, grad_norm: float) -> None:
        """Count a step without an update; too many in a row end the run."""
        self.skipped_in_a_row += 1
        step, limit = self.progress.step + 1, self.config.train.max_skipped_steps
        log.warning("Step %d: loss %s, gradient norm %s. The update was not made.", step, loss, grad_norm)
        if self.skipped_in_a_row >= limit:
            mine = [name for batch in batches for name in batch.ids]
            ids = [name for part in self.ranks.gather(mine) for name in part]
            shown = ", ".join(map(repr, ids[:8])) + (" ..." if len(ids) > 8 else "")
            raise self._diverged(
                step,
                f"loss {loss}, gradient norm {grad_norm}, the last of {limit} steps in a row without an update; its "
                f"rows are {shown}",
            )

    def _diverged(self, step: int, what: str) -> NumericsError:
        return NumericsError(
            f"Step {step}: {what}; the last checkpoint in {self.checkpoints} is good. Try a lower train.learning_rate."
        )

    def save(self) -> None:
        """Begin to write a checkpoint; parameters that are not finite end the run instead."""
        trained = [(name, local(p.detach())) for name, p in self.model.named_parameters() if p.requires_grad]
        finite = torch.stack([tensor.sum() for _, tensor in trained]).isfinite().tolist()  # the device is awaited once
        broken = [i for i, count in enumerate(self.ranks.sum([float(not good) for good in finite])) if count]
        if broken:
            name = trained[broken[0]][0]
            raise self._diverged(
                self.progress.step, f"its update left NaN or infinity in the parameter {name}. It was not saved"
            )
        self.saver.save(self.progress, self.model, self.optimizer)

    def _save_before_leaving(self) -> None:
        """Make sure that the step that was done last is saved."""
        is_saved = self.saver.finish() and self.saver.last_step == self.progress.step
        if self.ranks.sum([float(not is_saved)])[0] and self.progress.step > 0:
            self.save()
            self.saver.finish()

    def _stop(self, exit_code: int) -> None:
        step = self.progress.step
        if not self.saver.finish():
            raise CheckpointError(
                f"Stopped after step {step} of {self.num_steps}, but its checkpoint could not be written. The same "
                f"command goes on from {checkpoint.latest(self.checkpoints) or 'the beginning'}."
            )
        self.has_stopped = True
        raise Interrupted(
            f"Stopped after step {step} of {self.num_steps}; a checkpoint is saved. "
            "The same command goes on from here.",
            exit_code,
        )

    def _log(self, window: Window, grad_norm: float, trackers: list[Tracker], bar: tqdm) -> None:
        metrics: dict[str, float | None] = {"step": self.progress.step}
        metrics |= window.close(self.model.device)
        metrics |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "skipped_steps": self.progress.skipped,
            "bad_examples": self.progress.bad_examples,
            "train_seconds": self.progress.seconds,
        }
        for tracker in trackers:
            tracker.log(metrics)
        bar.set_description_str(line(metrics), refresh=False)

    def _note_bad_examples(self, batches: list[Batch]) -> None:
        """Append what was left out of this step to bad_examples.jsonl; rank 0 writes for all."""
        mine = [asdict(bad) for batch in batches for bad in batch.bad]
        found = [bad for part in self.ranks.gather(mine) for bad in part]
        lines = [json.dumps({"step": self.progress.step + 1} | bad) + "\n" for bad in found]
        if self.ranks.is_first:
            try:
                with (self.run_folder / BAD_EXAMPLES_FILE).open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as error:  # a full disk; they are told here instead
                log.warning("%s cannot be written (%s): %s", BAD_EXAMPLES_FILE, error.strerror, "".join(lines).rstrip())
