"""The training loop in one process: accumulation, stages, precision, seeds, batches, what it refuses to begin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cobra.train.run
from cobra.errors import BackendError, CheckpointError, CobraError, ConfigError, DataError
from cobra.models.build import build_model
from cobra.models.vlm import CobraVLM
from cobra.models.weights import KEPT_IN_FLOAT32
from cobra.ops import reference
from cobra.ops.dispatch import forced_backend
from cobra.train import checkpoint
from cobra.train.plots import plot_run
from cobra.train.run import pretrain

from .runs import Fit, assert_equal, losses, rows, state, steps_of, weights


def test_micro_batches_change_nothing(fit: Fit) -> None:
    """The loss is a mean over all labelled tokens of the global batch, however it is cut."""
    # One update of AdamW is lr * sign(gradient) at first, so a gradient near 0 may move an update by 2 lr: weights are
    # compared after three steps of a small rate, losses and gradient norms tightly.
    runs = [
        fit(
            f"run.name=by-{size}",
            f"train.per_device_batch_size={size}",
            "train.max_steps=3",
            "train.learning_rate=1e-5",
        )
        for size in (8, 4, 1)
    ]
    for run in runs[1:]:
        for row, expected in zip(rows(run), rows(runs[0]), strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        for name, tensor in weights(runs[0]).items():
            difference = (weights(run)[name] - tensor).abs()
            assert difference.mean() < 1e-6 and difference.max() <= 6.1e-5, name


def test_finetune_lowers_the_loss_and_leaves_a_complete_run_folder(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cobra.train.run.plot_run", plot_run)
    run = fit("train.max_steps=30", "train.save_every=10", "train.keep_checkpoints=2")
    values = losses(run)
    assert len(values) == 30 and sum(values[-5:]) < 0.85 * sum(values[:5])
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "loss.png", "throughput.png", "checkpoints", "model", ".lock"}
    assert steps_of(run / "checkpoints") == [20, 30]
    assert (run / "checkpoints" / "latest").read_text() == "step-000030\n"
    row = rows(run)[-1]
    assert row["step"] == 30 and row["lr"] > 0
    assert row.pop("mfu") is None  # nobody knows the peak of a CPU
    assert all(math.isfinite(value) and value >= 0 for value in row.values())


@pytest.mark.parametrize(
    ("stage", "moving"),
    [("align", {"projector"}), ("finetune", {"projector", "llm"}), ("full-finetune", {"projector", "llm", "vision"})],
)
def test_stage_moves_its_parts_only(
    fit: Fit, tiny_config, small_run: list[str], small_data, stage: str, moving: set[str]
) -> None:
    before = build_model(tiny_config(*small_run).model, seed=0).state_dict()
    after = weights(fit(f"train.stage={stage}", "train.max_steps=2", f"data.annotations={small_data.captions}"))
    assert {name.split(".")[0] for name, tensor in after.items() if not torch.equal(before[name], tensor)} == moving


def test_align_refuses_rows_without_image(fit: Fit) -> None:
    with pytest.raises(DataError, match="'text/0' has no image"):
        fit("train.stage=align")


def test_init_from_starts_from_another_run(fit: Fit, small_data) -> None:
    first = fit("run.name=first", "train.stage=align", "train.max_steps=3", f"data.annotations={small_data.captions}")
    second = fit("run.name=second", f"init_from={first}", "train.max_steps=1", "train.learning_rate=1e-30")
    for name, tensor in weights(first).items():  # the rate is too small to move anything but an exact 0
        torch.testing.assert_close(weights(second)[name], tensor, rtol=0, atol=1e-20)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        fit("run.name=third", f"init_from={first}", "model.llm.num_layers=1")
    halved = {name: tensor.bfloat16() for name, tensor in weights(first).items()}
    save_file(halved, first / "model" / "model.safetensors")
    fourth = fit("run.name=fourth", f"init_from={first}", "model.llm.weights=/absent", "train.max_steps=1")
    assert {tensor.dtype for tensor in weights(fourth).values()} == {torch.float32}  # and nothing else is looked for


def test_bf16_keeps_float32_of_what_learns(fit: Fit, whole_run: Path) -> None:
    """Frozen parts rest in bfloat16; trained ones, the scan's own and all moments of the optimizer are float32."""
    run = fit("parallel.precision=bf16")
    for name, tensor in weights(run).items():
        learns = name.split(".")[0] in ("projector", "llm") or name.endswith(KEPT_IN_FLOAT32)
        is_buffer = name.endswith((".mean", ".std"))
        assert tensor.dtype == (torch.float32 if learns or is_buffer else torch.bfloat16), name
    moments = {key: tensor for key, tensor in state(checkpoint.latest(run / "checkpoints")).items() if "exp_avg" in key}
    assert moments and {tensor.dtype for tensor in moments.values()} == {torch.float32}
    expected = losses(whole_run)
    assert losses(run) != expected  # it did compute in 16 bits
    assert losses(run) == pytest.approx(expected, rel=0.1)  # 8 bits of mantissa, over 12 updates


def test_seed_decides_what_layers_draw(fit: Fit) -> None:
    """Drop path draws in every step: the run's seed decides, not what the process drew before."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws = ["train.stage=full-finetune", "+model.vision.towers.0.args.drop_path_rate=0.5", "train.max_steps=2"]
        runs.append(weights(fit(f"run.name=drop-{seed}", *draws)))
    assert_equal(*runs)


def test_same_run_twice_gives_the_same_bits(tiny_config, small_run: list[str]) -> None:
    """At the tiny model's own size: large enough for every operation to use several threads."""
    overrides = [o for o in small_run if not o.startswith(("model.llm", "train.global", "train.per_device"))]
    overrides += ["data.rows_per_image=3", "train.global_batch_size=24", "train.per_device_batch_size=24"]
    runs = [pretrain(tiny_config(*overrides, "train.max_steps=6", f"run.name=take-{take}")) for take in range(2)]
    assert losses(runs[0]) == losses(runs[1])
    assert_equal(weights(runs[1]), weights(runs[0]))


def test_finished_run_is_left_as_it_is(fit: Fit, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    run = fit()
    assert run == finished and (run / "metrics.jsonl").read_text() == before


def test_export_that_a_kill_prevented_is_made_up_for(fit: Fit, finished: Path, whole_run: Path) -> None:
    (finished / "model" / "model.safetensors").unlink()
    (finished / "model").rename(finished / "elsewhere")
    assert_equal(weights(fit()), weights(whole_run))


def test_token_budget_trains_on_every_row_once_an_epoch(fit: Fit, monkeypatch: pytest.MonkeyPatch, small_data) -> None:
    seen: list[list[Any]] = []  # micro-batches of each step
    iterate = cobra.train.run.iterate

    def watched(*args: Any, **kwargs: Any) -> Any:
        for batches in iterate(*args, **kwargs):
            seen.append(batches)
            yield batches

    monkeypatch.setattr(cobra.train.run, "iterate", watched)
    budget = ["train.global_batch_tokens=1200", "train.per_device_batch_tokens=400"]
    run = fit(*budget, "train.max_steps=null", "train.epochs=1")
    ids = [name for step in seen for batch in step for name in batch.ids]
    assert len(ids) == len(set(ids)) == 78
    assert [row["step"] for row in rows(run)] == list(range(1, len(seen) + 1)) and all(map(math.isfinite, losses(run)))
    for step in seen:
        used = [b.input_ids.numel() + (0 if b.pixels is None else 64 * len(b.pixels[0])) for b in step]
        assert max(used) <= 400 and sum(b.lengths.sum() for b in step) <= 1200
    assert max(len(step) for step in seen) > 1  # it did accumulate
    with pytest.raises(ConfigError, match=r"per_device_batch_tokens=50 .* must hold the costliest image"):
        fit("train.global_batch_tokens=1200", "train.per_device_batch_tokens=50", "run.name=less")


def test_configured_ops_backend_is_used(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str | None] = []
    scan = reference.selective_scan
    monkeypatch.setattr(reference, "selective_scan", lambda *a, **k: used.append(forced_backend()) or scan(*a, **k))
    fit("parallel.ops=reference", "train.max_steps=1", "run.name=slow")
    assert set(used) == {"reference"}
    assert forced_backend() is None


def test_validation_changes_nothing_but_the_metrics(tiny_config, small_run: list[str], whole_run: Path) -> None:
    """It may put the model into evaluation mode; after it, training goes on as it was."""
    asked: list[int] = []

    def validator(model: CobraVLM, *_: Any) -> dict[str, float]:
        model.eval()
        asked.append(1)
        return {"val/accuracy": 10.0 * len(asked)}

    run = pretrain(tiny_config(*small_run, "validation.every=5"), validator)
    found = [row for row in rows(run) if "val/accuracy" in row]
    assert found == [{"step": step, "val/accuracy": 10.0 * (i + 1)} for i, step in enumerate((5, 10, 12))]
    assert [row["loss"] for row in rows(run) if "loss" in row] == losses(whole_run)
    assert_equal(weights(run), weights(whole_run))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.annotations=absent.json"], DataError, "absent.json"),
        (["data.images=absent"], DataError, "image folder absent does not exist"),
        (["model.llm.vocab_size=100"], ConfigError, "less than the tokenizer's 365 entries"),
        (["model.llm.tokenizer=absent.json"], CheckpointError, "model.llm.tokenizer=absent.json"),
        (["model.vision.towers.0.weights=absent"], CheckpointError, "towers[0].weights=absent"),
        (["init_from=absent"], CheckpointError, "no run or model folder"),
        (["parallel.device=gpu"], ConfigError, "'gpu' is not a device"),
        (["parallel.ops=cuda"], BackendError, "Unknown ops backend 'cuda'; known backends: "),
    ],
)
def test_bad_input_is_refused_before_training(
    fit: Fit, overrides: list[str], error: type[CobraError], message: str
) -> None:
    with pytest.raises(error) as caught:
        fit(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rows_cut_before_their_answer_are_named(fit: Fit) -> None:
    for length in (4, 1):
        with pytest.raises(DataError, match=r"78 x no answer within model\.max_length \(id '0/0'") as caught:
            fit(f"model.max_length={length}", "data.check=decode" if length == 4 else "data.check=exists")
        assert "None is left" in str(caught.value) and "\n" not in str(caught.value)
