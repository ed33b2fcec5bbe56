"""Runs that are asked to stop: by a signal or by the clock."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from cobra.errors import CheckpointError, Interrupted
from cobra.train import checkpoint, stopping
from cobra.train.checkpoint import Progress, Saver
from cobra.train.stopping import StopRequest, stop_signals

from .runs import Fit, assert_equal, at_step, losses, weights

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}


@pytest.mark.parametrize("number", CODES)
def test_signal_ends_the_step_and_saves(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, whole_run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(number))
        with pytest.raises(Interrupted, match="after step 6 of 12; a checkpoint is saved") as caught:
            fit()
    assert caught.value.exit_code == CODES[number] and "\n" not in str(caught.value)
    assert signal.getsignal(number) is before
    run = tmp_path / "runs" / "small"
    assert checkpoint.latest(run / "checkpoints") == run / "checkpoints" / "step-000006"
    assert not (run / "model").exists() and len(losses(run)) == 6
    assert_equal(weights(fit()), weights(whole_run))
    assert losses(run) == losses(whole_run)


def test_time_limit_saves_and_leaves(fit: Fit, monkeypatch: pytest.MonkeyPatch, whole_run: Path) -> None:
    """Counted from the start of the process, so also from each new start."""
    clock = [0.0]

    def tick() -> None:
        clock[0] += 121

    with monkeypatch.context() as patch:
        patch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        at_step(patch, 8, tick)
        with pytest.raises(Interrupted, match="after step 9 of 12") as caught:
            fit("train.max_minutes=2")
        assert caught.value.exit_code == 75
        at_step(patch, 10, tick)
        with pytest.raises(Interrupted, match="after step 11 of 12"):
            fit("train.max_minutes=2")
    assert_equal(weights(fit("train.max_minutes=100")), weights(whole_run))


def test_signal_in_the_last_step_ends_the_run_as_usual(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, whole_run: Path
) -> None:
    at_step(monkeypatch, 11, lambda: signal.raise_signal(signal.SIGTERM))
    assert_equal(weights(fit()), weights(whole_run))


def test_stopping_without_a_checkpoint_is_said(fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody may believe that the work is saved when the disk was full."""

    publish = Saver._publish

    def full(self: Saver, progress: Progress) -> None:
        if progress.step == 6:
            raise OSError(28, "No space left on device")
        publish(self, progress)

    monkeypatch.setattr(Saver, "_publish", full)
    at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(CheckpointError, match=r"after step 6 of 12, but .* could not be written.* goes on from ") as e:
        fit()
    assert f"{tmp_path}/runs/small/checkpoints/step-000004" in str(e.value) and "\n" not in str(e.value)


class TestRequest:
    def test_code_says_who_asked(self) -> None:
        request = StopRequest(None)
        assert request.exit_code == 0
        for number, code in CODES.items():
            request.signal = number
            assert request.exit_code == code
        assert StopRequest(1e-9).exit_code == 75 and StopRequest(60).exit_code == 0

    def test_second_signal_counts_after_two_seconds_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [100.0]
        monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        before, request = signal.getsignal(signal.SIGINT), StopRequest(None)
        with stop_signals(request):
            signal.raise_signal(signal.SIGINT)
            clock[0] += 1.5
            signal.raise_signal(signal.SIGTERM)  # the launcher passes on what the terminal has sent already
            assert request.exit_code == 130
            clock[0] += 1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
        signal.signal(signal.SIGINT, inherited)

    def test_other_threads_leave_signals_alone(self) -> None:
        problems: list[BaseException] = []

        def work() -> None:
            try:
                with stop_signals(StopRequest(None)):
                    pass
            except BaseException as error:
                problems.append(error)

        before = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not problems and signal.getsignal(signal.SIGTERM) is before
