"""Which parts of the model are in training mode, and what hangs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.checkpoint import checkpoint

from cobra.config import PretrainConfig
from cobra.train.run import pretrain


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_blocks_recompute_in_every_stage(
    stage: str,
    tiny_config: Callable[..., PretrainConfig],
    small_overrides: Callable[[Path], list[str]],
    small_data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the language model is frozen: the projector's gradient needs what its blocks keep."""
    recomputed: list[object] = []

    def noted(function, *args, **kwargs):  # type: ignore[no-untyped-def]
        recomputed.append(function)
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("cobra.models.mamba_block.checkpoint", noted)
    overrides = [*small_overrides(tmp_path), f"train.stage={stage}", f"data.annotations={small_data.captions}"]
    pretrain(tiny_config(*overrides, "parallel.recompute=1", "train.max_steps=1"))
    assert recomputed
