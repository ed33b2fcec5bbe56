"""A run that is cut and started again ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from cobra.train import checkpoint

from .runs import Fit, assert_equal, interrupt_after_second_save, losses, rows, state, weights


@pytest.mark.parametrize("stage", ["align", "finetune", "full-finetune"])
def test_resumed_run_equals_uninterrupted(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, small_data, whole_run: Path, stage: str
) -> None:
    options = [f"train.stage={stage}"]
    if stage == "align":  # image rows only
        options.append(f"data.annotations={small_data.captions}")
    whole = whole_run if stage == "finetune" else fit("run.name=whole", *options)
    with monkeypatch.context() as patch:
        interrupt_after_second_save(patch)
        with pytest.raises(KeyboardInterrupt):
            fit("run.name=cut", *options)
    newest = checkpoint.latest(whole.with_name("cut") / "checkpoints") if stage != "finetune" else None
    assert newest is None or newest.name == "step-000008"
    cut = fit("run.name=cut", "train.num_workers=1", *options)  # workers may differ
    assert_equal(weights(cut), weights(whole))
    assert losses(cut) == losses(whole) and len(losses(cut)) == 12
    assert_equal(*(state(run / "checkpoints" / "step-000012") for run in (cut, whole)))
    assert rows(cut)[-1]["train_seconds"] > rows(cut)[7]["train_seconds"]  # counted over both starts


def test_checkpoint_of_each_step_leads_to_the_same_end(fit: Fit, finished: Path, whole_run: Path) -> None:
    """From the first checkpoint, with what came after it still in the folder, as a kill may leave it."""
    (finished / "checkpoints" / "latest").write_text("step-000004\n")
    run = fit("train.save_every=3", "train.log_every=5")
    assert_equal(weights(run), weights(whole_run))
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 10, 12]
