"""The training loop, and nothing else."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from cobra.config import PretrainConfig
from cobra.data.batch import Batch
from cobra.errors import CheckpointError, DataError, Interrupted, NumericsError
from cobra.models.vlm import CobraOutput, CobraVLM
from cobra.runtime import peak_memory_gib
from cobra.train import checkpoint
from cobra.train.checkpoint import Progress
from cobra.train.optim import learning_rate
from cobra.train.trackers import Tracker

log = logging.getLogger(__name__)


class Trainer:
    """Runs steps until the last one; saves, logs and stops as configured."""

    def __init__(
        self,
        config: PretrainConfig,
        model: CobraVLM,
        optimizer: torch.optim.Optimizer,
        run_folder: Path,
        num_steps: int,
        *,
        data_digest: str,
    ) -> None:
        self.config = config
        self.model, self.optimizer = model, optimizer
        self.run_folder = run_folder
        self.checkpoints = run_folder / "checkpoints"
        self.num_steps = num_steps
        self.progress = Progress(data=data_digest)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def resume(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        newest = checkpoint.latest(self.checkpoints)
        if newest is not None:
            progress = checkpoint.load(newest, self.model, self.optimizer)
            if progress.data != self.progress.data:
                raise CheckpointError(
                    f"{newest} was trained on other rows than data.annotations holds now. Give it the same file, or "
                    "choose another run.name."
                )
            self.progress = progress
            log.info("Resuming from %s.", newest)

    def fit(self, steps: Iterable[list[Batch]], trackers: list[Tracker]) -> None:
        """Train on `steps`, the global batches from `progress.step` on.

        Raises:
            Interrupted: after a signal, once the step is finished and saved.
            NumericsError: the loss, a gradient or a parameter is not finite. An update from it has not been made, nor
                such parameters been saved.
        """
        train, window = self.config.train, _Window(self)
        bar = tqdm(
            total=self.num_steps,
            initial=self.progress.step,
            unit="step",
            disable=not log.isEnabledFor(logging.INFO),
            mininterval=0.5 if sys.stderr.isatty() else 15,
            bar_format="step {n_fmt}/{total_fmt} | {desc}{elapsed} gone, {remaining} left",
        )
        for part in self.model.children():
            part.train(any(parameter.requires_grad for parameter in part.parameters()))  # frozen: no drop path
        with bar, _stop_signals() as stop, self._saving_on_bad_data():
            for batches in steps:
                loss, grad_norm = self._step(batches)
                window.add(batches, loss)
                is_last = self.progress.step == self.num_steps
                if self.progress.step % train.log_every == 0 or is_last:
                    metrics = window.close(grad_norm)
                    for tracker in trackers:
                        tracker.log(metrics)
                    bar.set_description_str(_line(metrics), refresh=False)
                bar.update()
                is_stopping = bool(stop)  # read once: a signal between save and raise counts for the next step
                if self.progress.step % train.save_every == 0 or is_last or is_stopping:
                    self._save()
                if is_stopping and not is_last:
                    raise Interrupted(
                        f"Stopped after step {self.progress.step} of {self.num_steps}; a checkpoint is saved. "
                        "The same command goes on from here."
                    )

    def _step(self, batches: list[Batch]) -> tuple[float, float]:
        """Make one update from a global batch; return its loss (mean over all labelled tokens) and gradient norm."""
        started = time.perf_counter()
        train, step = self.config.train, self.progress.step
        device = self.model.device
        num_labels = sum(batch.num_labels for batch in batches)
        if num_labels == 0:
            raise DataError(
                f"Step {step + 1}: no row of the batch has an answer within model.max_length="
                f"{self.config.model.max_length} tokens; raise it, or find the rows with data.check=decode."
            )
        loss = torch.zeros((), device=device)
        for batch in batches:
            batch = batch.to(device)
            try:
                output = self._forward(batch)
            except NumericsError as error:  # of a parameter, found before there is a loss
                raise self._diverged(step + 1, f"{str(error).rstrip('.')}. The update was not made") from error
            assert output.loss_sum is not None  # the batch has labels
            part = output.loss_sum / num_labels
            part.backward()
            loss += part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            what = f"loss {float(loss)}, gradient norm {float(grad_norm)}. The update was not made"
            raise self._diverged(step + 1, what)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.num_steps, train)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress = replace(
            self.progress,
            step=step + 1,
            tokens=self.progress.tokens + sum(_num_tokens(batch, self.model) for batch in batches),
            seconds=self.progress.seconds + time.perf_counter() - started,
        )
        return float(loss), float(grad_norm)

    def _forward(self, batch: Batch) -> CobraOutput:
        is_mixed = self.config.parallel.precision == "bf16"
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=is_mixed):
            return self.model(
                batch.input_ids,
                pixels=batch.pixels,
                labels=batch.labels,
                image_index=batch.image_index,
                lengths=batch.lengths,
            )

    def _diverged(self, step: int, what: str) -> NumericsError:
        return NumericsError(
            f"Step {step}: {what}; the last checkpoint in {self.checkpoints} is good. Try a lower train.learning_rate."
        )

    @contextmanager
    def _saving_on_bad_data(self) -> Iterator[None]:
        """Save before an image or row that turns out to be broken ends the run."""
        try:
            yield
        except DataError:
            if self.progress.step > 0:
                self._save()
            raise

    def _save(self) -> None:
        trained = [(name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad]
        finite = torch.stack([tensor.sum() for _, tensor in trained]).isfinite().tolist()  # the device is awaited once
        if not all(finite):
            name = trained[finite.index(False)][0]
            raise self._diverged(
                self.progress.step, f"its update left NaN or infinity in the parameter {name}. It was not saved"
            )
        checkpoint.save(
            self.checkpoints, self.progress, self.model, self.optimizer, keep=self.config.train.keep_checkpoints
        )


class _Window:
    """Sums between two log lines."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._reset()

    def _reset(self) -> None:
        self.started, self.losses, self.examples = time.perf_counter(), [], 0
        self.tokens_before = self.trainer.progress.tokens

    def add(self, batches: list[Batch], loss: float) -> None:
        """Count a step."""
        self.losses.append(loss)
        self.examples += sum(len(batch.lengths) for batch in batches)

    def close(self, grad_norm: float) -> dict[str, float]:
        """Return the metrics of the window and start the next one."""
        trainer, seconds = self.trainer, time.perf_counter() - self.started
        metrics = {
            "step": trainer.progress.step,
            "loss": sum(self.losses) / len(self.losses),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "examples_per_second": self.examples / seconds,
            "tokens_per_second": (trainer.progress.tokens - self.tokens_before) / seconds,
            "memory_gib": peak_memory_gib(trainer.model.device),
            "train_seconds": trainer.progress.seconds,
        }
        self._reset()
        return metrics


def _num_tokens(batch: Batch, model: CobraVLM) -> int:
    num_images = 0 if batch.pixels is None else len(batch.pixels[0])
    return int(batch.lengths.sum()) + num_images * model.projector.num_tokens(model.vision.num_patches)


def _line(metrics: dict[str, float]) -> str:
    return (
        f"loss {metrics['loss']:.4f} | lr {metrics['lr']:.2e} | {metrics['examples_per_second']:,.0f} examples/s | "
        f"{metrics['tokens_per_second']:,.0f} tokens/s | {metrics['memory_gib']:.1f} GiB | "
    )


@contextmanager
def _stop_signals() -> Iterator[list[float]]:
    """Yield a list that fills when SIGINT or SIGTERM arrives; another one after two seconds acts as usual, at once."""
    received: list[float] = []

    def receive(number: int, _frame: object) -> None:
        now = time.monotonic()
        if not received:
            log.info("Stopping after this step; Ctrl-C once more, in two seconds or later, stops at once.")
        elif now - received[0] > 2:  # launchers often pass a signal on that the terminal has sent as well
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        received.append(now)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, receive)
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
