"""The run folder on several machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from cobra.errors import ConfigError
from cobra.ranks import Ranks
from cobra.train import folder


def test_folder_that_other_machines_lack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_SECONDS_TO_APPEAR", 0.0)
    with folder.locked(tmp_path / "run"):
        folder.check_shared(tmp_path / "run", Ranks())
    with pytest.raises(ConfigError, match=r"not there for rank 0 .* paths\.runs"):
        folder.check_shared(tmp_path / "elsewhere", Ranks())
