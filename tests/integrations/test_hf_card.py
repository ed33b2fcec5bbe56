"""The model card of an export, read by huggingface_hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cobra.config import ModelConfig
from cobra.errors import DataError

RESULT: dict[str, Any] = {
    "benchmark": "vsr",
    "model": "runs/tiny",
    "columns": {
        "VSR": {
            "questions": 1222,
            "rules": {
                "official": {"accuracy": 58.4321, "interval_95": [55.1, 61.2]},
                "paper": {"accuracy": 57.5, "interval_95": [54.0, 60.0]},
            },
        }
    },
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for benchmark in ("vsr", "pope"):
        folder = tmp_path / "results" / benchmark / "tiny"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(RESULT | {"benchmark": benchmark}))
    return tmp_path / "results"


def test_results_stand_in_the_card(small_model_config: ModelConfig, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from huggingface_hub import ModelCard

    from cobra.integrations.hf.card import model_card

    (tmp_path / "README.md").write_text(model_card(small_model_config, results))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    found = [(one.dataset_type, one.metric_value) for one in card.data.eval_results or []]
    assert sorted(found) == [("pope", 57.5), ("pope", 58.43), ("vsr", 57.5), ("vsr", 58.43)]
    assert "| VSR | 1,222 | official | 58.43 | 55.10 - 61.20 |" in card.text
    small = RESULT | {"columns": {"VSR": RESULT["columns"]["VSR"] | {"reference": 57.5, "is_whole": False}}}
    (results / "vsr" / "tiny" / "results.json").write_text(json.dumps(small))
    text = model_card(small_model_config, results)
    assert "| VSR (other questions) | 1,222" in text and "type: vsr-other-questions" in text and "type: pope\n" in text
    assert "model-index" not in model_card(small_model_config, None)


def test_results_of_other_kinds_are_refused(small_model_config: ModelConfig, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from cobra.integrations.hf.card import model_card

    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no results\.json"):
        model_card(small_model_config, tmp_path / "empty")
    (results / "vsr" / "tiny" / "results.json").write_text(json.dumps(RESULT | {"model": "runs/other"}))
    with pytest.raises(DataError, match=r"several models \(runs/other, runs/tiny\)"):
        model_card(small_model_config, results)
    (results / "vsr" / "tiny" / "results.json").write_text(json.dumps(RESULT | {"columns": {"VSR": {}}}))
    with pytest.raises(DataError, match="not as evaluations write them"):
        model_card(small_model_config, results)
    (results / "vsr" / "tiny" / "results.json").write_text("{}")
    with pytest.raises(DataError, match="lacks benchmark, model, columns"):
        model_card(small_model_config, results)
