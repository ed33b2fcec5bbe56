"""Real processes that are killed or interrupted, and started again."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cobra.errors import CheckpointError
from cobra.train.run import pretrain

from .runs import assert_equal, losses, rows, state

LONGER = ["train.max_steps=30", "train.save_every=4"]


@pytest.fixture
def start(command, small_overrides) -> Callable[[Path], subprocess.Popen[str]]:
    """Start 30 steps of training in a process of its own, with its run folder below `runs`."""

    def run(runs: Path) -> subprocess.Popen[str]:
        arguments = [*small_overrides(runs), *LONGER]
        return subprocess.Popen(
            command("pretrain", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return run


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until metrics.jsonl has `step` lines."""
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def test_killed_and_interrupted_run_ends_with_the_same_bytes(start, tiny_config, small_overrides, tmp_path) -> None:
    """SIGKILL, then the same command, then Ctrl-C, then the same command: as if nothing had happened.

    While a process lives, nobody else gets into its folder; when it is killed, its lock goes with it.
    """
    run = tmp_path / "small"
    process = start(tmp_path)
    wait_for_step(process, run, 1)
    process.send_signal(signal.SIGSTOP)  # so that it cannot finish meanwhile
    with pytest.raises(CheckpointError, match=f"Another process trains in {run} at this moment"):
        pretrain(tiny_config(*small_overrides(tmp_path)))
    process.send_signal(signal.SIGCONT)
    wait_for_step(process, run, 10)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model").exists()

    process = start(tmp_path)
    wait_for_step(process, run, 18)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in output and "error" not in output.lower()
    step = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    (message,) = [line for line in output.splitlines() if "Stopped after" in line]
    assert step >= 18 and f"after step {step} of 30; a checkpoint is saved. The same command goes on" in message
    assert not (run / "model").exists()

    assert f"Resuming from {run}/checkpoints/step-{step:06d}" in finish(start(tmp_path))
    expected = pretrain(tiny_config(*small_overrides(tmp_path / "undisturbed"), *LONGER))
    file = "model/model.safetensors"
    assert (run / file).read_bytes() == (expected / file).read_bytes()
    assert_equal(*(state(folder / "checkpoints" / "step-000030") for folder in (run, expected)))
    assert losses(run) == losses(expected)
    assert [row["step"] for row in rows(run)] == list(range(1, 31))
