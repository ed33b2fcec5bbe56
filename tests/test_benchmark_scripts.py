"""The benchmarks of generation run, on the smallest sizes; their times say nothing here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cobra.config import LLMConfig
from cobra.ops import use_backend

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let them be imported, and use operations that need no compilation."""
    monkeypatch.syspath_prepend(FOLDER)
    with use_backend("reference"):
        yield


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


def test_inference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = importlib.import_module("inference")
    options = ["--size", "tiny", "--device", "cpu", "--quantize", "int8", "--rounds", 1, "--gigabytes", 0.001]
    options += ["--batches", 2, "--prompts", 5, "--new-tokens", 4, "--contexts", 3, 6, "--no-memory"]
    run(module, monkeypatch, *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "inference.json").read_text())["rows"]
    assert {(row["batch"], row["prompt"], row["new"]) for row in rows} == {(2, 5, 4), (1, 3, 16), (1, 6, 16)}
    found = {row["name"]: row for row in rows[: len(rows) // 3]}
    assert {"Cobra", "Cobra int8", "transformers Mamba", "transformer (Llama)"} <= found.keys()
    assert found["Cobra"]["same"] == 1.0 and found["transformer (Llama)"]["same"] is None
    assert all(row["first"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert (tmp_path / "inference.png").stat().st_size > 10_000


def test_quantization(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = importlib.import_module("quantization")
    small = LLMConfig(d_model=64, num_layers=2, vocab_size=50277, tokenizer="", prompt="mamba")
    monkeypatch.setattr(module, "MAMBA_130M", small)
    run(module, monkeypatch, "--seconds", 0.05, "--json", tmp_path / "rows.json")
    rows = {row["way"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    ways = ["float32", "bfloat16", "int8", "int4"]
    assert set(ways) <= rows.keys()
    sizes = [rows[way]["megabytes"] for way in ways]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 6 * sizes[-1]
    assert rows["float32"]["kl_mean"] == 0 and rows["float32"]["same"] == rows["float32"]["times_float32"] == 1
    assert 0 < rows["int8"]["kl_mean"] < rows["int4"]["kl_mean"]
