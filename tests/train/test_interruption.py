"""Real processes that are killed or interrupted, and started again."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def start(command, small_overrides) -> Callable[[Path], subprocess.Popen[str]]:
    """Start 30 steps of training in a process of its own, with its run folder below `runs`."""

    def run(runs: Path) -> subprocess.Popen[str]:
        arguments = [*small_overrides(runs), "train.max_steps=30", "train.save_every=4"]
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


def test_killed_and_interrupted_run_ends_with_the_same_bytes(start, tmp_path: Path) -> None:
    """SIGKILL, then the same command, then Ctrl-C, then the same command: as if nothing had happened."""
    undisturbed = start(tmp_path / "undisturbed")
    run, expected = tmp_path / "small", tmp_path / "undisturbed" / "small"

    process = start(tmp_path)
    wait_for_step(process, run, 10)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model").exists()

    process = start(tmp_path)
    wait_for_step(process, run, 18)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output
    (error,) = [line for line in output.splitlines() if "error:" in line]
    step = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert step >= 18 and f"after step {step} of 30; a checkpoint is saved" in error
    assert not (run / "model").exists()

    assert f"Resuming from {run}/checkpoints/step-{step:06d}" in finish(start(tmp_path))
    finish(undisturbed)
    file = "model/model.safetensors"
    assert (run / file).read_bytes() == (expected / file).read_bytes()
    tensors, wanted = (load_file(r / "checkpoints/step-000030/tensors.safetensors") for r in (run, expected))
    assert tensors.keys() == wanted.keys()
    for name in wanted:  # the optimizer and the random state too
        assert torch.equal(tensors[name], wanted[name]), name
    lines = [[line.split(",")[:2] for line in (folder / "metrics.jsonl").open()] for folder in (run, expected)]
    assert lines[0] == lines[1] and len(lines[0]) == 30  # step and loss of every line
