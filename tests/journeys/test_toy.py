"""The toy journey: the script writes, training finds what was written, an evaluation answers from it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml
from hydra.utils import instantiate

from cobra.config import EvaluateConfig, PathsConfig, PretrainConfig
from cobra.eval.run import evaluate
from cobra.train.run import pretrain

Script = Callable[..., subprocess.CompletedProcess[str]]
POPE = Path(__file__).resolve().parents[2] / "configs" / "benchmark" / "pope.yaml"
SIZES = {"train": 12, "vqav2": 4, "gqa": 1, "vizwiz": 3, "textvqa": 2, "vsr": 2, "pope": 2, "refcoco": 4}
FEW_STEPS = [
    *("train.max_steps=2", "train.global_batch_size=2", "train.per_device_batch_size=2"),
    *("model.llm.d_model=32", "model.llm.num_layers=2", "parallel.device=cpu"),
]


def test_toy_is_written_learnt_and_asked(
    script: Script, tiny_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    sizes = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    written = script("make_toy_benchmarks", *sizes, "--chance")
    assert written.returncode == 0, written.stderr
    assert "refcoco  RefCOCO+" in written.stdout and "+experiment=tiny-toy" in written.stdout
    folders = [f"paths.data={tmp_path / 'data'}", f"paths.runs={tmp_path / 'runs'}"]
    run = pretrain(tiny_config("+experiment=tiny-toy", *folders, *FEW_STEPS))
    benchmark = instantiate(yaml.safe_load(POPE.read_text()) | {"data_root": str(tmp_path / "data" / "toy")})
    paths = PathsConfig(data="", runs="", results=str(tmp_path / "results"))
    scores = evaluate(EvaluateConfig(load=str(run), device="cpu", paths=paths), benchmark)
    assert {part: score.num_questions for part, score in scores.parts["official"].items()} == {
        "random": 12, "popular": 12, "adversarial": 12, "all": 36,
    }  # fmt: skip


def test_mistakes_end_in_one_line(script: Script, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    for arguments, words in ((["--out", "data"], "is not empty"), (["--gqa", "0"], "gqa=0")):
        result = script("make_toy_benchmarks", *arguments)
        assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1
