"""Model folders: written whole, read exactly, refused by name, never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cobra.errors import CheckpointError
from cobra.models.build import KEPT_IN_FLOAT32, cast_parameters
from cobra.models.vlm import CobraVLM
from cobra.models.weights import load_model_folder, save_model_folder
from cobra.text.tokenizer import Tokenizer

NORM = "llm.backbone.norm_f.weight"


@pytest.fixture
def folder(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model_folder(small_model, tokenizer.file, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_model_folder_round_trip_is_exact(small_model: CobraVLM, folder: Path, tokenizer: Tokenizer) -> None:
    loaded = load_model_folder(folder)
    assert loaded.state_dict().keys() == small_model.state_dict().keys()
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.llm.lm_head.weight is loaded.llm.backbone.embedding.weight
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.file.read_bytes()
    ids = torch.arange(1, 8)[None]
    torch.testing.assert_close(loaded(ids).logits, small_model(ids).logits, rtol=0, atol=0)


def test_model_folder_stands_for_itself(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert [tower["weights"] for tower in config["vision"]["towers"]] == ["random", "random"]
    assert config["llm"]["tokenizer"] == "tokenizer.json"
    assert "llm.lm_head.weight" not in load_file(folder / "model.safetensors")  # tied: stored once
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]  # nothing temporary is left


def test_files_are_readable_for_whom_the_umask_lets(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {oct(0o666 & ~mask)}


def test_model_folder_cannot_point_outside(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["llm"]["tokenizer"] = "/etc/passwd"
    config["vision"]["towers"][0]["weights"] = "timm"  # would download
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model_folder(folder).config.llm.tokenizer == "tokenizer.json"
    for hostile in ({"args": {"checkpoint_path": "/etc/passwd"}}, {"timm": "hf-hub:somebody/something"}):
        bad = json.loads(json.dumps(config))
        bad["vision"]["towers"][0] |= hostile
        (folder / "config.json").write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=r"model\.vision\.towers"):
            load_model_folder(folder)


def test_wrong_keys_are_all_named_in_one_error(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[NORM]
        tensors["llm.extra"] = torch.zeros(1)
        tensors["projector.projector.0.bias"] = torch.zeros(7)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_model_folder(folder)
    message = str(caught.value)
    assert str(folder / "model.safetensors") in message and "\n" not in message
    assert f"missing: {NORM} (1)" in message and "unexpected: llm.extra (1)" in message
    assert "wrong shape: projector.projector.0.bias [7] (needs [256])" in message


def test_many_wrong_keys_are_all_named_in_groups(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    rewrite(folder, dict.clear)
    with pytest.raises(CheckpointError, match=rf"missing: .* \({len(names)}\)\. Use the model config") as caught:
        load_model_folder(folder)
    listed = str(caught.value).split("missing: ")[1].split(" (")[0]
    groups = re.split(r", ", listed)
    found = []
    for group in groups:
        head, _, rest = group.partition("{")
        inside, _, tail = rest.partition("}")
        runs = [run.split("..") for run in inside.split(",")] if inside else []
        found += [f"{head}{i}{tail}" for run in runs for i in range(int(run[0]), int(run[-1]) + 1)] or [group]
    assert sorted(found) == sorted(names)
    assert "llm.backbone.layers.{0..1}.mixer.D" in groups and "projector.projector.{0,2,4}.bias" in groups


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "not valid JSON"),
        (lambda text: text.replace('"num_layers"', '"num_layer"'), "Did you mean 'num_layers'"),
        (lambda text: text.replace('"num_layers": 2', '"num_layers": "two"'), "num_layers='two'"),
    ],
)
def test_damaged_config_is_refused(folder: Path, change: Callable[[str], str], message: str) -> None:
    file = folder / "config.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model_folder(folder)
    assert str(file) in str(caught.value)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.file,)


def test_pickled_weights_are_refused_unopened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model_folder(folder)
    assert not (tmp_path / "sprung").exists()


def test_cast_keeps_the_scan_parameters_in_float32(small_model: CobraVLM) -> None:
    cast_parameters(small_model, torch.bfloat16)
    for name, parameter in small_model.named_parameters():
        kept = name.endswith(KEPT_IN_FLOAT32)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert kept == any(name.endswith(f"mixer.{part}") for part in ("A_log", "D", "dt_proj.bias")), name
