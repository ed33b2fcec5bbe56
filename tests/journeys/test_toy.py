"""The toy journey: the script writes, training finds it, an evaluation answers from it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Script = Callable[..., subprocess.CompletedProcess[str]]
SIZES = {"train": 12, "vqav2": 4, "gqa": 1, "vizwiz": 3, "textvqa": 2, "vsr": 2, "pope": 2, "refcoco": 4}
FEW_STEPS = [
    *("train.max_steps=2", "train.global_batch_size=2", "train.per_device_batch_size=2"),
    *("model.llm.d_model=32", "model.llm.num_layers=2", "parallel.device=cpu"),
]


def test_toy_is_written_learnt_and_asked(script: Script, tmp_path: Path) -> None:
    sizes = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    written = script("make_toy_benchmarks", *sizes, "--chance")
    assert written.returncode == 0, written.stderr
    assert "refcoco  RefCOCO+" in written.stdout and "+experiment=tiny-toy" in written.stdout
    trained = script("pretrain", "+experiment=tiny-toy", *FEW_STEPS)
    assert trained.returncode == 0, trained.stderr
    asked = script("evaluate", "benchmark=pope", "data_root=data/toy", "model=runs/tiny-toy", "device=cpu")
    assert asked.returncode == 0, asked.stderr
    results = json.loads((tmp_path / "results" / "pope" / "tiny-toy" / "results.json").read_text())
    assert results["num_questions"] == 2 * 18


def test_mistakes_end_in_one_line(script: Script, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    for arguments, words in ((["--out", "data"], "is not empty"), (["--gqa", "0"], "gqa=0")):
        result = script("make_toy_benchmarks", *arguments)
        assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1
