"""Checkpoints on disk: complete or not there, written while training goes on, and read without trust."""

from __future__ import annotations

import io
import logging
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from cobra.errors import CheckpointError
from cobra.models.sharded import read_sharded
from cobra.train import checkpoint
from cobra.train.checkpoint import Progress

from .runs import Fit, Small, assert_equal, losses, steps_of, weights

FULL = OSError(28, "No space left on device")


def fail_at_the_second(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Make the second checkpoint fail where tensors are written, where it is renamed, or where `latest` is written."""
    owner = {"write_data": dcp.FileSystemWriter, "rename": Path, "write_text": checkpoint}[broken]
    real, calls = getattr(owner, broken), []

    def call(*args: Any, **kwargs: Any) -> Any:
        relevant = broken != "rename" or re.fullmatch(r"step-\d+\.tmp", args[0].name) is not None
        calls.extend([1] * relevant)
        if relevant and len(calls) == 2:
            raise FULL
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, broken, call)


class TestFailedWrite:
    @pytest.mark.parametrize("broken", ["write_data", "rename", "write_text"])
    def test_training_goes_on(
        self, fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog, whole_run: Path, broken: str
    ) -> None:
        """As if nothing had happened but a message, and the next checkpoint is good."""
        fail_at_the_second(monkeypatch, broken)
        run = fit("train.keep_checkpoints=3")
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        (message,) = [record.getMessage() for record in errors if record.name.startswith("cobra")]
        assert "step 8 could not be written" in message and "No space left on device" in message
        assert f"Training goes on; the last good one is {run}/checkpoints/step-000004. Is the disk" in message
        assert message.count("\n") == 0
        assert_equal(weights(run), weights(whole_run))
        assert losses(run) == losses(whole_run)
        assert steps_of(run / "checkpoints") == [4, 8, 12] if broken == "write_text" else [4, 12]
        assert checkpoint.latest(run / "checkpoints") == run / "checkpoints" / "step-000012"
        assert not list(run.rglob("*tmp*"))

    @pytest.mark.parametrize("broken", ["write_data", "rename", "write_text"])
    def test_last_good_one_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
        small = Small(tmp_path, keep=1)
        fail_at_the_second(monkeypatch, broken)
        small.save(4)
        assert small.saver.finish()
        expected = small.parameters()
        small.learn()
        small.save(8)
        assert not small.saver.finish() and small.saver.finish()  # told once
        newest = checkpoint.latest(tmp_path)
        assert newest == tmp_path / "step-000004" and not list(tmp_path.glob("*.tmp"))
        assert_equal(read_sharded(newest), expected)
        small.save(12)
        assert small.saver.finish()
        assert checkpoint.latest(tmp_path) == tmp_path / "step-000012"

    def test_disk_that_is_really_full(self, tmp_path: Path) -> None:
        """No file may grow beyond a limit: writes fail in the middle of a tensor, in a thread of torch's."""
        program = f"""
            import resource, signal, sys, logging
            from pathlib import Path
            from tests.train.runs import Small
            from torch import nn, optim
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            small = Small(Path({str(tmp_path)!r}))
            small.save(1)
            assert small.saver.finish()
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
            small.save(2)
            assert not small.saver.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            small.save(3)
            assert small.saver.finish()
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "The checkpoint of step 2 could not be written" in done.stdout and "Is the disk of" in done.stdout
        assert steps_of(tmp_path) == [1, 3]
        small = Small(tmp_path / "another")
        assert [small.load(tmp_path / f"step-00000{step}").step for step in (1, 3)] == [1, 3]


class TestInTheBackground:
    def test_writing_holds_nothing_but_the_next_checkpoint(self, tmp_path: Path, monkeypatch) -> None:
        """What is trained meanwhile is not in the checkpoint, and a second one waits for the first."""
        small, gate, write = Small(tmp_path), threading.Event(), dcp.FileSystemWriter.write_data

        def slow(*args: Any, **kwargs: Any) -> Any:
            assert gate.wait(60)
            return write(*args, **kwargs)

        monkeypatch.setattr(dcp.FileSystemWriter, "write_data", slow)
        first = small.parameters()
        small.save(1)
        for _ in range(3):  # steps go on, and nothing is published
            small.learn()
            small.saver.poll()
        assert checkpoint.latest(tmp_path) is None
        second = small.parameters()
        assert not torch.equal(first["0.weight"], second["0.weight"])
        threading.Timer(0.3, gate.set).start()
        small.save(2)  # waits
        assert gate.is_set() and checkpoint.latest(tmp_path) == tmp_path / "step-000001"
        assert small.saver.finish()
        assert_equal(read_sharded(tmp_path / "step-000001"), first)
        assert_equal(read_sharded(tmp_path / "step-000002"), second)

    def test_slow_disk_does_not_hold_the_steps(self, fit: Fit, monkeypatch, whole_run: Path, tmp_path: Path) -> None:
        """All steps after the first checkpoint are done before its writer is let go on."""
        gate, write = threading.Event(), dcp.FileSystemWriter.write_data
        metrics, seen = tmp_path / "runs" / "small" / "metrics.jsonl", []

        def slow(*args: Any, **kwargs: Any) -> Any:
            while metrics.read_text().count("\n") < 11 and not gate.wait(0.01):
                pass
            seen.append(metrics.read_text().count("\n"))
            return write(*args, **kwargs)

        watchdog = threading.Timer(60, gate.set)
        watchdog.start()
        monkeypatch.setattr(dcp.FileSystemWriter, "write_data", slow)
        run = fit("train.save_every=6")
        watchdog.cancel()
        assert not gate.is_set() and seen[0] >= 11 and len(seen) == 2
        assert_equal(weights(run), weights(whole_run))

    def test_poll_publishes_what_is_complete(self, tmp_path: Path) -> None:
        small = Small(tmp_path)
        small.save(1)
        small.saver._running[1].result()  # type: ignore[index]
        small.saver.poll()
        assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"


class TestKept:
    @pytest.mark.parametrize(
        ("keep", "keep_every", "expected"), [(1, None, [6]), (2, None, [5, 6]), (1, 2, [2, 4, 6]), (2, 3, [3, 5, 6])]
    )
    def test_newest_and_every(self, tmp_path: Path, keep: int, keep_every: int | None, expected: list[int]) -> None:
        small = Small(tmp_path, keep=keep, keep_every=keep_every)
        for step in range(1, 7):
            small.save(step)
        assert small.saver.finish()
        assert steps_of(tmp_path) == expected
        assert checkpoint.latest(tmp_path) == tmp_path / "step-000006"

    def test_run_that_went_back_keeps_what_it_writes(self, tmp_path: Path) -> None:
        """A kill between a checkpoint's renaming and `latest` leaves a newer one that nothing points to."""
        small = Small(tmp_path, keep=1)
        for step in (4, 8):
            small.save(step)
        small.save(5)
        assert small.saver.finish()
        assert checkpoint.latest(tmp_path) == tmp_path / "step-000005"
        assert small.load(tmp_path / "step-000005").step == 5

    def test_other_folders_are_left_alone(self, tmp_path: Path) -> None:
        small = Small(tmp_path, keep=1)
        for name in ("step-000001.bak", "step-best", "notes"):
            (tmp_path / name).mkdir()
        for step in (2, 3):
            small.save(step)
        assert small.saver.finish()
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == ["latest", "notes", "step-000001.bak", "step-000003", "step-best"]

    def test_left_over_of_a_kill_is_removed(self, tmp_path: Path) -> None:
        (tmp_path / "step-000004.tmp").mkdir()
        (tmp_path / "step-000004.tmp" / "__0_0.distcp").write_bytes(b"half")
        Small(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_latest_of_nothing_is_none(self, tmp_path: Path) -> None:
        assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "absent") is None


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Small, Path]:
    """A checkpoint, and what it is of."""
    small = Small(tmp_path)
    small.save(4)
    assert small.saver.finish()
    return small, tmp_path / "step-000004"


def readers(small: Small, folder: Path) -> list[Callable[[], Any]]:
    return [lambda: small.load(folder), lambda: read_sharded(folder)]


class TestReading:
    def test_everything_comes_back(self, saved: tuple[Small, Path]) -> None:
        small, folder = saved
        parameters, drawn = small.parameters(), torch.rand(3)
        moments = [{k: v.clone() for k, v in small.optimizer.state[p].items()} for p in small.model.parameters()]
        small.learn()
        assert small.load(folder) == Progress(step=4, tokens=40, data="rows")
        assert_equal(small.parameters(), parameters)
        for parameter, expected in zip(small.model.parameters(), moments, strict=True):
            assert_equal(small.optimizer.state[parameter], expected)
        assert torch.equal(torch.rand(3), drawn)  # the random state too

    def test_weights_alone_are_the_exported_model(self, whole_run: Path) -> None:
        assert_equal(read_sharded(whole_run / "checkpoints" / "step-000012"), weights(whole_run))

    @pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "state.json"])
    @pytest.mark.parametrize(
        "damage", [lambda c: c[:-100], lambda c: c[: len(c) // 2], lambda c: b"", None], ids=["cut", "half", "", "gone"]
    )
    def test_damaged_file_is_named_with_a_remedy(self, saved: tuple[Small, Path], file: str, damage) -> None:
        small, folder = saved
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        if damage is not None:
            (folder / file).write_bytes(damage(content))
        expected = small.parameters()
        with pytest.raises(CheckpointError) as caught:
            small.load(folder)
        message = str(caught.value)
        assert message.startswith(f"The checkpoint {folder} is damaged: ") and "\n" not in message
        assert "older checkpoint" in message and "delete the run folder to start anew" in message
        try:
            assert_equal(read_sharded(folder), expected)  # damage may have spared the weights
        except CheckpointError as error:
            assert str(error).startswith(f"The checkpoint {folder} is damaged: ") and "\n" not in str(error)
            assert "Use an older one" in str(error)
        else:
            assert file == "state.json" or (damage is not None and damage(content))

    @pytest.mark.parametrize("content", ['{"step": 4, "other": 1}', "[4]", '"text"'])
    def test_state_of_another_kind_is_damage(self, saved: tuple[Small, Path], content: str) -> None:
        small, folder = saved
        (folder / "state.json").write_text(content)
        with pytest.raises(CheckpointError, match="is damaged"):
            small.load(folder)

    def test_trainer_says_so_too(self, fit: Fit, finished: Path) -> None:
        newest = finished / "checkpoints" / "step-000012"
        (newest / ".metadata").unlink()
        with pytest.raises(CheckpointError, match="delete the run folder to start anew") as caught:
            fit()
        assert str(newest) in str(caught.value) and "\n" not in str(caught.value)
        shutil.rmtree(newest)  # the remedy
        (finished / "checkpoints" / "latest").write_text("step-000008\n")
        assert checkpoint.latest(fit() / "checkpoints") == newest

    def test_latest_that_names_nothing_is_an_error(self, fit: Fit, finished: Path) -> None:
        (finished / "checkpoints" / "latest").write_text("step-000777\n")
        with pytest.raises(CheckpointError, match="step-000777"):
            fit()

    def test_another_models_is_refused_by_name(self, saved: tuple[Small, Path], tmp_path: Path) -> None:
        small, folder = saved
        small.model.add_module("2", torch.nn.Linear(4, 4))
        with pytest.raises(CheckpointError, match=r"missing: model\.2\.bias, model\.2\.weight \(2\)"):
            small.load(folder)
        del small.model[1:]
        with pytest.raises(CheckpointError, match=r"unexpected: model\.1\.bias"):
            small.load(folder)


class Command:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.command = f"touch {file}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (self.command,)


class TestCodeInACheckpoint:
    def test_index_runs_nothing(self, saved: tuple[Small, Path], tmp_path: Path) -> None:
        small, folder = saved
        proof = tmp_path / "was here"
        pickle.loads(pickle.dumps(Command(proof.with_name("works"))))
        assert proof.with_name("works").exists()  # it is a real one
        (folder / ".metadata").write_bytes(pickle.dumps(Command(proof)))
        for read in readers(small, folder):
            with pytest.raises(CheckpointError, match=r"is damaged: \S+ its index asks for posix\.system") as caught:
                read()
            assert "\n" not in str(caught.value)
        assert not proof.exists()

    @pytest.mark.parametrize("module", ["checkpoint.filesystem", "checkpoint.metadata"])
    @pytest.mark.parametrize("name", ["os.system", "Path.touch", "FileSystem", "warnings.os.system"])
    def test_names_with_dots_reach_nothing(self, saved, tmp_path: Path, module: str, name: str) -> None:
        """`find_class` would follow them from a module of torch's to what that module has imported."""
        small, folder = saved
        proof = tmp_path / "proof"

        def text(value: str) -> bytes:
            return b"\x8c" + bytes([len(value)]) + value.encode()

        call = text(f"torch.distributed.{module}") + text(name) + b"\x93" + text(f"touch {proof}") + b"\x85R."
        (folder / ".metadata").write_bytes(b"\x80\x04" + call)
        for read in readers(small, folder):
            with pytest.raises(CheckpointError, match="which no checkpoint of ours holds"):
                read()
        assert not proof.exists()

    def test_entries_that_torch_would_unpickle_are_refused(self, saved: tuple[Small, Path], tmp_path: Path) -> None:
        """Beside tensors, torch stores bytes that it loads without any check."""
        small, folder = saved
        proof = tmp_path / "proof"
        index = pickle.loads((folder / ".metadata").read_bytes())
        key = "model.0.bias"
        (entry,) = [found for found in index.storage_data if found.fqn == key]
        payload = io.BytesIO()
        torch.save(Command(proof), payload)
        (folder / "evil.distcp").write_bytes(payload.getvalue())
        index.state_dict_metadata[key] = BytesStorageMetadata()
        info = index.storage_data.pop(entry)
        info.relative_path, info.offset, info.length = "evil.distcp", 0, len(payload.getvalue())
        index.storage_data[type(entry)(key)] = info
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        for read in readers(small, folder):
            with pytest.raises(CheckpointError, match="is damaged"):
                read()
        assert not proof.exists()
        dcp.load({key: None}, checkpoint_id=folder, no_dist=True)
        assert proof.exists()  # torch alone would have run it
