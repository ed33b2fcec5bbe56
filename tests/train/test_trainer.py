"""The training loop in one process: accumulation, stages, stopping, checkpoints, metrics."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cobra.config import PretrainConfig, TrainConfig
from cobra.errors import (
    BackendError,
    CheckpointError,
    CobraError,
    ConfigError,
    DataError,
    Interrupted,
    NumericsError,
)
from cobra.models.build import build_model, set_trainable
from cobra.models.loss import labelled_loss
from cobra.ops import reference
from cobra.ops.dispatch import forced_backend
from cobra.train import checkpoint
from cobra.train.optim import build_optimizer, learning_rate
from cobra.train.run import pretrain
from cobra.train.trackers import JsonlTracker, read_metrics

Fit = Callable[..., Path]


@pytest.fixture
def fit(tiny_config: Callable[..., PretrainConfig], small_run: list[str]) -> Fit:
    """Train the small run with further overrides; return the run folder."""
    return lambda *overrides: pretrain(tiny_config(*small_run, *overrides))


def weights(run_folder: Path) -> dict[str, Tensor]:
    return load_file(run_folder / "model" / "model.safetensors")


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_folder / "metrics.jsonl")]


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
        for row, expected in zip(*(read_metrics(r / "metrics.jsonl") for r in (run, runs[0])), strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        for name, tensor in weights(runs[0]).items():
            difference = (weights(run)[name] - tensor).abs()
            assert difference.mean() < 1e-6 and difference.max() <= 6.1e-5, name


def test_finetune_lowers_the_loss_and_leaves_a_complete_run_folder(fit: Fit) -> None:
    run = fit("train.max_steps=30", "train.save_every=10", "train.keep_checkpoints=2")
    values = losses(run)
    assert len(values) == 30 and sum(values[-5:]) < 0.85 * sum(values[:5])
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "model"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-000020", "step-000030"]
    assert (run / "checkpoints" / "latest").read_text() == "step-000030\n"
    Image.open(run / "loss.png").verify()
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["step"] == 30 and row["lr"] > 0
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


def test_bf16_trains_with_float32_weights(fit: Fit) -> None:
    run = fit("parallel.precision=bf16", "run.name=bf16")
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    expected = losses(fit("run.name=fp32"))
    assert losses(run) != expected  # it did compute in 16 bits
    assert losses(run) == pytest.approx(expected, rel=0.1)  # 8 bits of mantissa, over 12 updates


@pytest.mark.parametrize("stage", ["align", "finetune", "full-finetune"])
def test_resumed_run_equals_uninterrupted(fit: Fit, monkeypatch: pytest.MonkeyPatch, small_data, stage: str) -> None:
    options = [f"train.stage={stage}"]
    if stage == "align":  # image rows only
        options.append(f"data.annotations={small_data.captions}")
    whole = fit("run.name=whole", *options)
    calls = []

    def save(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        fit("run.name=cut", *options)
    monkeypatch.setattr(checkpoint, "save", real)
    cut = fit("run.name=cut", "train.num_workers=1", *options)  # workers may differ
    assert_equal(weights(cut), weights(whole))
    assert losses(cut) == losses(whole)
    assert len(calls) == 2


def test_seed_decides_what_layers_draw(fit: Fit) -> None:
    """Drop path draws in every step: the run's seed decides, not what the process drew before."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws = ["train.stage=full-finetune", "+model.vision.towers.0.args.drop_path_rate=0.5", "train.max_steps=2"]
        runs.append(weights(fit(f"run.name=drop-{seed}", *draws)))
    assert_equal(*runs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_step_and_saves(fit: Fit, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    def interrupting(step: int, num_steps: int, config: TrainConfig) -> float:
        if step == 5 and signal.getsignal(number) is not before:
            signal.raise_signal(number)
        return learning_rate(step, num_steps, config)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("cobra.train.trainer.learning_rate", interrupting)
        with pytest.raises(Interrupted, match="after step 6 of 12"):
            fit("run.name=cut")
    assert signal.getsignal(number) is before
    assert_equal(weights(fit("run.name=cut")), weights(fit("run.name=whole")))


def test_finished_run_is_left_as_it_is(fit: Fit) -> None:
    before = (fit() / "metrics.jsonl").read_text()
    run = fit()
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("where", ["parameters", "loss"])
def test_divergence_stops_before_the_update(fit: Fit, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    steps = []

    def rate(step: int, num_steps: int, config: TrainConfig) -> float:
        steps.append(step)
        return math.nan if step == 5 and where == "parameters" else 1e-3  # the next step finds weights of NaN

    def poisoned_loss(*args: Tensor) -> tuple[Tensor, Tensor]:
        loss_sum, count = labelled_loss(*args)
        return loss_sum * (math.nan if len(set(steps)) == 6 and where == "loss" else 1), count

    monkeypatch.setattr("cobra.train.trainer.learning_rate", rate)
    monkeypatch.setattr("cobra.models.vlm.labelled_loss", poisoned_loss)
    found = "NaN" if where == "parameters" else "loss nan"
    with pytest.raises(NumericsError, match=rf"^Step 7: .*\b{found}\b.*last checkpoint in .* is good") as caught:
        fit()
    assert "\n" not in str(caught.value)
    assert sorted(set(steps)) == [0, 1, 2, 3, 4, 5]


def test_parameters_that_are_not_finite_are_not_saved(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rate(step: int, num_steps: int, config: TrainConfig) -> float:
        return math.nan if step == 5 else 1e-3

    monkeypatch.setattr("cobra.train.trainer.learning_rate", rate)
    with pytest.raises(NumericsError, match=r"^Step 6: .* parameter \S+\.weight\b.*last checkpoint in .* is good"):
        fit("train.save_every=1", "run.name=diverging")
    newest = checkpoint.latest(tmp_path / "runs" / "diverging" / "checkpoints")
    assert newest is not None and newest.name == "step-000005"
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(newest / "tensors.safetensors").values())


class TestOptimizer:
    def test_decay_spares_vectors_and_the_scan(self, small_model) -> None:
        set_trainable(small_model, "full-finetune")
        config = TrainConfig(
            stage="full-finetune",
            global_batch_size=1,
            per_device_batch_size=1,
            learning_rate=1.0,
            max_steps=1,
            weight_decay=0.1,
        )
        decayed, spared = build_optimizer(small_model.named_parameters(), config).param_groups
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
        names = {id(parameter): name for name, parameter in small_model.named_parameters()}
        spared_names = {names[id(parameter)] for parameter in spared["params"]}
        assert {id(p) for p in decayed["params"] + spared["params"]} == names.keys()
        assert len(decayed["params"]) + len(spared["params"]) == len(names)
        for name in names.values():
            must_spare = name.endswith(
                ("bias", "A_log", ".D", "norm.weight", "norm_f.weight", "norm1.weight", "norm2.weight")
            )
            assert not must_spare or name in spared_names, name
        assert all(f"llm.backbone.layers.0.mixer.{n}_proj.weight" not in spared_names for n in ("in", "x", "dt", "out"))

    @pytest.mark.parametrize(("num_steps", "warmup_ratio", "warmup"), [(100, 0.05, 5), (40, 0.0, 0), (7, 0.5, 4)])
    def test_schedule_is_linear_then_cosine(self, num_steps: int, warmup_ratio: float, warmup: int) -> None:
        config = TrainConfig(
            stage="align",
            global_batch_size=1,
            per_device_batch_size=1,
            learning_rate=2.0,
            max_steps=num_steps,
            warmup_ratio=warmup_ratio,
        )
        rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
        for step, rate in enumerate(rates):
            if step < warmup:
                expected = 2.0 * (step + 1) / warmup
            else:
                expected = 2.0 * math.cos(0.5 * math.pi * (step - warmup) / (num_steps - warmup)) ** 2
            assert rate == pytest.approx(expected, rel=1e-12)
        assert max(rates) == 2.0 and min(rates) > 0


class TestCheckpoint:
    @pytest.mark.parametrize("broken", ["save_file", "rename", "write_text"])
    def test_crash_during_save_leaves_the_last_one_valid(self, fit: Fit, monkeypatch, broken: str) -> None:
        run = fit("train.max_steps=12", "run.name=whole")
        calls = []

        def fail_at_the_second(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                relevant = broken != "rename" or "step-" in str(args[0])
                calls.extend([1] * relevant)
                if relevant and len(calls) == 2:
                    raise OSError("no space left on device")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            owner, name = (Path, "rename") if broken == "rename" else (checkpoint, broken)
            patch.setattr(owner, name, fail_at_the_second(getattr(owner, name)))
            with pytest.raises(OSError, match="no space"):
                fit("run.name=crash")
        crashed = run.with_name("crash")
        assert (crashed / "checkpoints" / "latest").read_text() == "step-000004\n"
        assert_equal(weights(fit("run.name=crash")), weights(run))
        assert not list((crashed / "checkpoints").glob("*tmp*"))

    @pytest.mark.parametrize(
        ("file", "change"),
        [
            ("tensors.safetensors", lambda content: content[:-100]),
            ("tensors.safetensors", lambda content: b""),
            ("state.json", lambda content: content[:5]),
            ("state.json", lambda content: b'{"step": 4, "other": 1}'),
            ("state.json", None),
        ],
    )
    def test_damaged_checkpoint_is_named_with_a_remedy(self, fit: Fit, file: str, change) -> None:
        folder = fit("train.max_steps=4", "train.save_every=4") / "checkpoints" / "step-000004"
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        if change is not None:
            (folder / file).write_bytes(change(content))
        with pytest.raises(CheckpointError, match="delete the run folder to start anew") as caught:
            fit("train.max_steps=4", "train.save_every=4")
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def test_latest_that_names_nothing_is_an_error(self, fit: Fit) -> None:
        run = fit("train.max_steps=4")
        (run / "checkpoints" / "latest").write_text("step-000777\n")
        with pytest.raises(CheckpointError, match="step-000777"):
            fit("train.max_steps=4")


class TestMetrics:
    def test_lines_after_the_checkpoint_are_dropped(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path, first_step=0)
        for step in range(1, 8):
            tracker.log({"step": step, "loss": step / 3})
        tracker.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "lo')  # a kill in the middle of a line
        tracker = JsonlTracker(tmp_path, first_step=4)
        tracker.log({"step": 5, "loss": 0.5})
        tracker.close()
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
        assert rows[3] == {"step": 4, "loss": 4 / 3} and rows[4]["loss"] == 0.5


class TestRunFolder:
    def test_other_settings_are_refused_by_name(self, fit: Fit) -> None:
        fit("train.max_steps=1")
        with pytest.raises(CheckpointError) as caught:
            fit("train.max_steps=2", "train.betas=[0.5,0.9]", "model.llm.d_state=8")
        message = str(caught.value)
        assert "train.max_steps: 1 there, 2 asked for" in message and "\n" not in message
        assert "train.betas" in message and "model.llm.d_state: 16 there, 8 asked for" in message
        assert message.count(" there, ") == 3

    def test_settings_that_change_no_weight_may_differ(self, fit: Fit) -> None:
        run = fit("train.max_steps=1")
        fit("train.max_steps=1", "train.save_every=7", "train.log_every=3", "train.num_workers=1", "data.check=exists")
        assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 1

    def test_resume_never_refuses_an_existing_run(self, fit: Fit) -> None:
        fit("train.max_steps=1")
        with pytest.raises(CheckpointError, match="resume=never"):
            fit("train.max_steps=1", "resume=never")

    def test_finished_model_without_checkpoints_is_not_trained_over(self, fit: Fit) -> None:
        run = fit("train.max_steps=1")
        before = (run / "model" / "model.safetensors").read_bytes()
        shutil.rmtree(run / "checkpoints")
        for overrides in (["train.max_steps=1"], ["train.max_steps=2"], ["resume=never"]):
            with pytest.raises(CheckpointError, match="holds a"):
                fit(*overrides)
        assert (run / "model" / "model.safetensors").read_bytes() == before

    def test_other_rows_are_refused(self, fit: Fit, small_data) -> None:
        fit("train.max_steps=1")
        with pytest.raises(CheckpointError, match="trained on other rows"):
            fit("train.max_steps=1", f"data.annotations={small_data.captions}")

    def test_unreadable_config_is_named(self, fit: Fit) -> None:
        run = fit("train.max_steps=1")
        (run / "config.yaml").write_text("just text")
        with pytest.raises(CheckpointError, match="is not a config"):
            fit("train.max_steps=1")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_broken_mid_run_saves_and_is_named(fit: Fit, small_data, tmp_path: Path, num_workers: int) -> None:
    images = tmp_path / "images"
    shutil.copytree(small_data.images, images)
    (images / "7.png").write_bytes(b"not a picture")
    options = [f"data.images={images}", "data.check=exists", f"train.num_workers={num_workers}", "run.name=broken"]
    with pytest.raises(DataError, match=r"^The image \S*7\.png does not decode[^\n]*$"):
        fit(*options)
    run = tmp_path / "runs" / "broken"
    done = len(losses(run))
    newest = checkpoint.latest(run / "checkpoints")
    assert done == 0 or (newest is not None and newest.name == f"step-{done:06d}")


def test_rows_cut_before_their_answer_are_named(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows have no answer within model\.max_length=4 tokens"):
        fit("model.max_length=4")
    with pytest.raises(DataError, match="no row of the batch has an answer"):
        fit("model.max_length=1", "data.check=exists")


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


def test_configured_ops_backend_is_used(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str | None] = []
    scan = reference.selective_scan
    monkeypatch.setattr(reference, "selective_scan", lambda *a, **k: used.append(forced_backend()) or scan(*a, **k))
    fit("parallel.ops=reference", "train.max_steps=1", "run.name=slow")
    assert set(used) == {"reference"}
    assert forced_backend() is None


def test_wandb_works_offline(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = fit("tracker=wandb", "tracker.wandb.mode=offline", "train.max_steps=2")
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(losses(run)) == 2


def test_same_run_twice_gives_the_same_bits(tiny_config, small_run: list[str]) -> None:
    """At the tiny model's own size: large enough for every operation to use several threads."""
    overrides = [o for o in small_run if not o.startswith(("model.llm", "train.global", "train.per_device"))]
    overrides += ["data.rows_per_image=3", "train.global_batch_size=24", "train.per_device_batch_size=24"]
    runs = [pretrain(tiny_config(*overrides, "train.max_steps=8", f"run.name=take-{take}")) for take in range(2)]
    assert losses(runs[0]) == losses(runs[1])
    assert_equal(weights(runs[1]), weights(runs[0]))
