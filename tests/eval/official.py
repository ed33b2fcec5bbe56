"""Where the scorers' fixtures lie, and the benchmarks as their YAML files configure them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import instantiate

from cobra.config import EvaluateConfig, PathsConfig
from cobra.eval.benchmark import Benchmark

LIMIT = 24
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "benchmark"
FOLDERS = {
    "vqav2": "vqa-v2", "gqa": "gqa", "vizwiz": "vizwiz", "textvqa": "text-vqa", "vsr": "vsr", "pope": "pope",
    "refcoco": "refcoco",
}  # fmt: skip


def configured(name: str, data_root: Path, **changes: Any) -> Benchmark:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return instantiate(config | {"data_root": str(data_root)} | changes, _convert_="all")


def predictions_file(assets: Path, name: str) -> Path:
    return assets / "fixtures" / "scorers" / FOLDERS[name] / "predictions.jsonl"


def expected(assets: Path, name: str) -> dict[str, Any]:
    return json.loads(predictions_file(assets, name).with_name("expected.json").read_text())


def config_of(run: Path, output: Path, **settings: Any) -> EvaluateConfig:
    chosen: dict[str, Any] = {"limit": LIMIT, "batch_size": 10, "device": "cpu"} | settings
    return EvaluateConfig(paths=PathsConfig(), load=str(run), output=str(output), **chosen)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def short(name: str, data_root: Path) -> Any:
    """The benchmark; the untrained model would write on and on."""
    benchmark = configured(name, data_root)
    if hasattr(benchmark, "max_new_tokens"):
        benchmark.max_new_tokens = 6  # type: ignore[attr-defined]
    return benchmark
