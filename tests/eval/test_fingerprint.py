"""What answers depend on: the weights, every settings file of a model, what is given beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cobra.eval.fingerprint import model_fingerprint
from cobra.hub import WEIGHTS_VARIABLE


def differing(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def append(file: Path, text: str = "\n") -> None:
    """A change that leaves JSON and YAML what they are."""
    with file.open("a") as stream:
        stream.write(text)


def test_every_settings_file_of_a_model_folder_counts(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained_run / "model", folder)
    first = model_fingerprint(str(folder))
    assert first == model_fingerprint(str(trained_run))
    for name in ("config.json", "tokenizer.json", "preprocessor.json"):
        append(folder / name)
        changed = model_fingerprint(str(folder))
        assert differing(first, changed) == {"model config"}
        first = changed
    append(folder / "notes.md")
    assert model_fingerprint(str(folder)) == first


def test_tokenizer_of_a_checkpoint_counts(trained_run: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    file = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    shutil.copy(trained_run / "model" / "tokenizer.json", tmp_path)
    config["model"]["llm"]["tokenizer"] = str(tmp_path / "tokenizer.json")
    file.write_text(yaml.safe_dump(config))
    first = model_fingerprint(str(checkpoint))
    append(tmp_path / "tokenizer.json")
    assert differing(first, model_fingerprint(str(checkpoint))) == {"model config"}


@pytest.mark.parametrize(
    ("argument", "given", "other"),
    [
        ("vision", {"resize": "letterbox"}, {"resize": "resize-crop"}),
        ("llm", {"prompt": "mamba"}, {"prompt": "zephyr"}),
    ],
)
def test_overrides_count_by_what_they_say(
    trained_run: Path, tmp_path: Path, argument: str, given: dict[str, str], other: dict[str, str]
) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(given))
    by_mapping, by_file, by_other = (
        model_fingerprint(str(trained_run), **{argument: value})
        for value in (given, tmp_path / "a.yaml", str(tmp_path / "b.yaml"))
    )
    assert by_mapping == by_file == by_other and json.loads(json.dumps(by_file)) == by_file
    assert differing(by_file, model_fingerprint(str(trained_run))) == {argument}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(other))
    changed = model_fingerprint(str(trained_run), **{argument: tmp_path / "a.yaml"})
    assert differing(by_file, changed) == {argument}


def test_tokenizer_that_an_override_names_counts_by_content(trained_run: Path, tmp_path: Path) -> None:
    shutil.copy(trained_run / "model" / "tokenizer.json", tmp_path / "mine.json")
    (tmp_path / "llm.yaml").write_text("tokenizer: mine.json\n")  # relative to the file
    first = model_fingerprint(str(trained_run), llm=tmp_path / "llm.yaml")
    assert model_fingerprint(str(trained_run), llm={"tokenizer": str(tmp_path / "mine.json")}) == first
    append(tmp_path / "mine.json")
    assert differing(first, model_fingerprint(str(trained_run), llm=tmp_path / "llm.yaml")) == {"llm"}


def test_parts_that_a_public_run_finds_elsewhere_count(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture's checkpoint holds no encoders; here they stand where timm's published ones are looked for."""
    (folder,) = (assets / "fixtures" / "public-cobra-tiny" / "run").iterdir()
    encoders = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384.webli")
    for name in encoders:
        (tmp_path / "timm" / name).mkdir(parents=True)
        (tmp_path / "timm" / name / "model.safetensors").write_bytes(name.encode())
    shutil.copytree(assets / "data" / "gpt-neox-tokenizer", tmp_path / "gpt-neox-20b")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
    first = model_fingerprint(str(folder))
    for name in encoders:
        append(tmp_path / "timm" / name / "model.safetensors")
        changed = model_fingerprint(str(folder))
        assert differing(first, changed) == {"model"}
        first = changed
    append(tmp_path / "gpt-neox-20b" / "tokenizer.json")
    assert differing(first, model_fingerprint(str(folder))) == {"model config"}
