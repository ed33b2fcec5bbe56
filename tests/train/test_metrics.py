"""What is counted, its pictures, and the profile."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cobra.config import ParallelConfig, TrainConfig
from cobra.data.batch import Example, collate
from cobra.train import metrics
from cobra.train.metrics import PEAK_TFLOPS, Counts, Flops, Window, peak_flops
from cobra.train.plots import plot_run
from cobra.train.trackers import JsonlTracker, read_metrics

from .runs import Fit, rows


def example(*lengths: int, image: bool = True, ids: bool = True) -> Example:
    """One image (or text) with rows of these numbers of tokens, of which all but the first are labelled."""
    pixels = [torch.zeros(3, 8, 8, dtype=torch.uint8)] if image else None
    made = [([1] * length, [-100] + [1] * (length - 1)) for length in lengths]
    return Example(pixels=pixels, rows=made, ids=tuple(f"r{i}" for i in range(len(lengths))) if ids else ())


def stage_config(stage: str) -> TrainConfig:
    return TrainConfig(stage=stage, global_batch_size=1, per_device_batch_size=1, learning_rate=1.0, max_steps=1)


class TestFlops:
    def test_of_the_small_model_by_hand(self, small_model_config) -> None:
        """Two towers of width 64 read at their second block, 64 patches of 8 x 8; two Mamba blocks of width 32."""
        patches, width = 64, 64
        block = 3 * width * width + width * width + 2 * width * 4 * width  # qkv, output, MLP: weights
        patch = 3 * 8 * 8 * width
        towers = 0
        for tokens in (patches + 5, patches):  # with class and four register tokens; without
            towers += 2 * patch * patches + 2 * (2 * block * tokens + 4 * tokens**2 * width)
        projector = [2 * 64 * weights for weights in (128 * 256, 256 * 32, 32 * 32)]

        inner, states, rank = 64, 16, 2
        products = 2 * (32 * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * 32)
        token = 2 * (products + inner * (2 * 4 + 7 * states))  # with convolution and scan
        head = 2 * 32 * 368

        for stage, llm, back in (
            ("align", 2, 2 * sum(projector) - projector[0]),
            ("finetune", 3, 2 * sum(projector) - projector[0]),
            ("full-finetune", 3, 2 * sum(projector)),
        ):
            flops = Flops(small_model_config, stage_config(stage))
            # Gradients of inputs and of weights cost as much again each, but pixels need none.
            seen = 3 * towers - 2 * (2 * patch * patches) if stage == "full-finetune" else towers
            assert flops.image == seen + sum(projector) + back + llm * 64 * token
            assert flops.text_token == llm * (token + head)
            counts = Counts(images=3, rows=5, text_tokens=70, positions=1000)
            assert flops.of(counts) == 3 * flops.image + 70 * flops.text_token


class TestCounts:
    def test_of_batches(self) -> None:
        batches = [
            collate([example(4, 7), example(5)], pad_id=0),
            collate([example(3, image=False), example(1, image=False, ids=False)], pad_id=0),
        ]
        counts = Counts.of(batches, image_tokens=10)
        assert (counts.rows, counts.images, counts.pads) == (4, 2, 1)
        assert counts.labels == 3 + 6 + 4 + 2
        assert counts.text_tokens == 4 + 7 + 5 + 3  # the pad's token is none of the data's
        assert counts.positions == 3 * 7 + 2 * 10 + 2 * 3
        assert counts.tokens(10) == 20 + 19
        assert Counts(*counts.values()) == counts


class TestWindow:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        return now

    def test_rates_and_fractions_by_hand(self, clock: list[float]) -> None:
        flops = SimpleNamespace(of=lambda counts: 3e12 * counts.images)
        window = Window(flops, peak=1e12, world_size=2, image_tokens=10)  # type: ignore[arg-type]
        step = Counts(rows=8, images=4, text_tokens=50, positions=120, pads=1, wait_seconds=3)
        window.add(step, 2.0)
        window.add(step, None)  # a skipped step has no loss, but its time and its tokens count
        window.add(step, 4.0)
        clock[0] += 20
        window.exclude(8.0)
        found = window.close(torch.device("cpu"))
        assert found["loss"] == 3.0
        assert found["examples_per_second"] == pytest.approx(24 / 12)
        assert found["tokens_per_second"] == pytest.approx(3 * 90 / 12)
        assert found["mfu"] == pytest.approx(3 * 12e12 / 12 / 2e12)
        assert found["padding_fraction"] == pytest.approx(1 - 90 / 120)
        assert found["data_wait_fraction"] == pytest.approx(9 / 2 / 12)  # the ranks' mean
        assert found["pads"] == 3 and found["memory_gib"] > 0.1
        clock[0] += 1
        window.add(step, None)
        again = window.close(torch.device("cpu"))
        assert again["loss"] is None and again["examples_per_second"] == pytest.approx(8)

    def test_unknown_peak_has_no_mfu(self, clock: list[float]) -> None:
        window = Window(SimpleNamespace(of=lambda _: 1.0), None, 1, 10)  # type: ignore[arg-type]
        clock[0] += 1
        assert window.close(torch.device("cpu"))["mfu"] is None

    def test_peak_is_given_or_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda, name = torch.device("cuda"), ["NVIDIA A100-SXM4-80GB"]
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name[0])
        assert peak_flops(ParallelConfig(peak_tflops=2.5), torch.device("cpu")) == 2.5e12
        assert peak_flops(ParallelConfig(), torch.device("cpu")) is None
        assert peak_flops(ParallelConfig(precision="bf16"), cuda) == 312e12
        assert peak_flops(ParallelConfig(precision="fp32"), cuda) is None
        for name[0], expected in (
            ("NVIDIA H100 PCIe", 756),
            ("NVIDIA H100 80GB HBM3", 989),
            ("NVIDIA A10G", 70),
            ("NVIDIA A10", 125),
            ("NVIDIA GH200 480GB", 989),
            ("NVIDIA L40S", 362),
            ("NVIDIA L40", 181),
            ("NVIDIA L4", 121),
            ("Tesla T4", None),
        ):
            found = peak_flops(ParallelConfig(precision="bf16"), cuda)
            assert found == (None if expected is None else expected * 1e12), name
        assert all(peak > 1 for peak in PEAK_TFLOPS.values())


def test_metrics_of_a_run(whole_run: Path, small_model_config) -> None:
    found = rows(whole_run)
    assert [row["step"] for row in found] == list(range(1, 13))
    flops = Flops(small_model_config, stage_config("finetune"))
    for row in found:
        assert 0 <= row["padding_fraction"] < 1 and 0 <= row["data_wait_fraction"] <= 1
        assert row["pads"] == row["skipped_steps"] == row["bad_examples"] == 0
        per_second = row["mfu"] * 0.05e12
        # A step of text alone costs what its tokens cost; an image's tokens cost more each, as they were seen first.
        per_token = per_second / row["tokens_per_second"]
        assert 0.999 * flops.text_token < per_token < flops.image / 64
    assert any(row["padding_fraction"] > 0 for row in found)


def test_waiting_for_data_is_seen(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    import cobra.train.run

    iterate = cobra.train.run.iterate

    def slow(*args, **kwargs):
        for batches in iterate(*args, **kwargs):
            time.sleep(0.5)
            yield batches

    monkeypatch.setattr(cobra.train.run, "iterate", slow)
    (row,) = rows(fit("train.max_steps=3", "train.log_every=3"))
    assert 0.4 < row["data_wait_fraction"] <= 1


def pixels_near(file: Path, color: tuple[int, int, int]) -> int:
    image = Image.open(file).convert("RGB")
    found = image.getcolors(1 << 24)
    assert found is not None
    return sum(n for n, c in found if max(abs(a - b) for a, b in zip(c, color, strict=True)) < 12)


BLUE, ORANGE, GREEN, RED = (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)
CYAN, PURPLE = (23, 190, 207), (148, 103, 189)


class TestPictures:
    @pytest.mark.parametrize(
        ("name", "colors"),
        [("loss.png", (BLUE, ORANGE, GREEN)), ("throughput.png", (BLUE, CYAN, RED, ORANGE, GREEN, PURPLE))],
    )
    def test_show_every_curve(self, whole_run: Path, name: str, colors) -> None:
        Image.open(whole_run / name).verify()
        assert min(Image.open(whole_run / name).size) > 500
        for color in colors:
            assert pixels_near(whole_run / name, color) > 150, color

    def test_take_gaps_and_validations(self, tmp_path: Path) -> None:
        tracker = JsonlTracker(tmp_path, first_step=0)
        base = {"lr": 1e-3, "tokens_per_second": 5.0, "examples_per_second": 1.0, "memory_gib": 1.0}
        base |= {"data_wait_fraction": 0.1, "padding_fraction": 0.2}
        for step in range(1, 9):
            skipped = step in (1, 4, 8)
            loss = {"loss": None if skipped else 1 / step, "grad_norm": float("nan") if skipped else 0.5}
            tracker.log({"step": step, "mfu": None} | loss | base)
        tracker.log({"step": 8, "val/accuracy": 50.0})
        tracker.close()
        plot_run(tmp_path)
        assert pixels_near(tmp_path / "loss.png", BLUE) > 150 and pixels_near(tmp_path / "loss.png", ORANGE) > 150
        assert pixels_near(tmp_path / "throughput.png", GREEN) == 0  # no MFU

    def test_take_a_run_that_has_learnt_nothing(self, tmp_path: Path) -> None:
        plot_run(tmp_path)
        assert not list(tmp_path.iterdir())
        row = dict.fromkeys(("lr", "tokens_per_second", "examples_per_second", "memory_gib"), 1.0)
        row |= {"step": 1, "loss": None, "grad_norm": None, "data_wait_fraction": 0.0, "padding_fraction": 0.0}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        plot_run(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png", "throughput.png"}


class TestProfile:
    def test_trace_and_summary(self, fit: Fit, whole_run: Path) -> None:
        run = fit("train.profile=2", "train.max_steps=6")
        trace = json.loads((run / "profile" / "trace-rank0.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"]]
        assert sum(name.startswith("ProfilerStep#") for name in names) >= 2
        steps = {name for name in names if name.startswith("ProfilerStep#")}
        assert steps == {"ProfilerStep#3", "ProfilerStep#4"}  # the first three are left out
        assert any("aten::" in name for name in names)
        summary = (run / "profile" / "summary-rank0.txt").read_text()
        assert "Self CPU" in summary and "aten::" in summary and summary.count("\n") < 45

    def test_without_it_there_is_no_folder(self, whole_run: Path) -> None:
        assert not (whole_run / "profile").exists()


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, first_step=0)
    for step in range(1, 8):
        tracker.log({"step": step, "loss": step / 3})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    tracker = JsonlTracker(tmp_path, first_step=4)
    tracker.log({"step": 5, "loss": 0.5})
    tracker.close()
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert found[3] == {"step": 4, "loss": 4 / 3} and found[4]["loss"] == 0.5
