"""The run folder on several machines, and on full disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cobra.errors import ConfigError
from cobra.models.sharded import read_sharded
from cobra.ranks import Ranks
from cobra.train import folder
from cobra.train.trackers import JsonlTracker

from .runs import Small, assert_equal


def test_another_number_of_machines_is_no_other_run(tiny_config, tmp_path: Path) -> None:
    """The layout over them may change with it."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000001\n")
    folder.write_config(tmp_path, tiny_config())
    layout = ["replicate=2", "processes=8", "reshard=true", "shard_frozen=false", "recompute=1"]
    folder.check_run_folder(tmp_path, tiny_config(*(f"parallel.{setting}" for setting in layout)))


def test_folder_that_other_machines_lack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_SECONDS_TO_APPEAR", 0.0)
    with folder.locked(tmp_path / "run"):
        folder.check_shared(tmp_path / "run", Ranks())
    with pytest.raises(ConfigError, match=r"not there for rank 0 .* paths\.runs"):
        folder.check_shared(tmp_path / "elsewhere", Ranks())


def test_step_that_is_saved_again_replaces_the_whole_checkpoint(tmp_path: Path) -> None:
    small = Small(tmp_path, keep=1)
    small.save(4)
    assert small.saver.finish()
    small.learn()
    small.save(4)
    assert small.saver.finish()
    assert_equal(read_sharded(tmp_path / "step-000004"), small.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000004"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a thing of Linux")
def test_metrics_that_a_full_disk_refuses_end_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = JsonlTracker(tmp_path, 0)
    with Path("/dev/full").open("a") as full:
        tracker._file = full
        for step in (1, 2):
            tracker.log({"step": step})
        tracker.close()
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "cobra.train.trackers"]
    assert "metrics.jsonl cannot be written (No space left on device). Training goes on." in warning
