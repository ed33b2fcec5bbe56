"""Weight files: read by name, damaged and dangerous ones refused, nothing ever unpickled into code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cobra.config import LLMConfig, TowerConfig
from cobra.errors import CheckpointError
from cobra.models import readers
from cobra.models.mamba import MambaLM
from cobra.models.pretrained import load_llm, load_tower, mamba_sizes, mamba_weights, unwrapped
from cobra.models.readers import Weights, read_weights
from cobra.models.vision import VisionTower
from cobra.models.weights import fill, parameters_on_meta

TINY_VIT = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(4, 6, generator=generator), "b": torch.randn(3, generator=generator).bfloat16()}


def same(found: Weights, expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_give_their_tensors(tensors: dict[str, Tensor], tmp_path: Path, legacy: bool) -> None:
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        weights = read_weights(tmp_path / name)
        assert same(weights, tensors)
        assert weights.shapes == {"a.weight": (4, 6), "b": (3,)}


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_are_read_by_their_index(tensors: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    places = {name: f"{stem}-0000{i}-of-00002.{suffix}" for i, name in enumerate(tensors, 1)}
    for name, file in places.items():
        (save_file if suffix == "safetensors" else torch.save)({name: tensors[name]}, tmp_path / file)
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(read_weights(tmp_path), tensors)


def test_pages_are_given_back_while_a_file_is_read(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By mapping the file anew, now and then; what was read before stays good."""
    torch.save(tensors, tmp_path / "x.pt")
    weights, loads = read_weights(tmp_path / "x.pt"), []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(1) or load(*args, **options))
    assert same(weights, tensors) and not loads
    monkeypatch.setattr(readers, "_RELEASE_AFTER", 0)
    first = weights["a.weight"]
    assert same(weights, tensors) and torch.equal(first, tensors["a.weight"]) and loads


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "absent.safetensors"}, "missing: absent.safetensors"),
        ({"a.weight": "../outside.safetensors"}, "outside its folder"),
        ({"a.weight": "/outside.safetensors"}, "outside its folder"),
        ({"a.weight": ".."}, "outside its folder"),
        ({"c": "x.safetensors"}, r"not in their shards: c \(x"),
        ({"a.weight": 3}, "no weight_map"),
        ("x.safetensors", "no weight_map"),
    ],
)
def test_wrong_indexes_are_refused(
    tensors: dict[str, Tensor], tmp_path: Path, weight_map: object, message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "x.safetensors")
    save_file(tensors, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(folder)
    assert str(index) in str(caught.value)
    index.write_text('{"weight_map":')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_weights(folder)


@pytest.mark.parametrize("name", ["x.pt", "old.pt", "x.safetensors"])
@pytest.mark.parametrize("kept", [0, 3, 60, -1, -400])
def test_truncated_files_are_refused(tensors: dict[str, Tensor], tmp_path: Path, name: str, kept: int) -> None:
    tensors = {"w": torch.randn(40, 40), **tensors}
    torch.save(tensors, tmp_path / "x.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "x.safetensors")
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_weights(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("start", "end"), [(0, 4), (-26, -22), (-22, -18)])
def test_files_with_a_damaged_frame_are_refused(
    tensors: dict[str, Tensor], tmp_path: Path, start: int, end: int
) -> None:
    """Of the zip file that torch.save writes: its first mark, and the records at its end."""
    torch.save(tensors, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[start:end] = b"\xff" * (end - start)
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "model.safetensors"])
def test_git_lfs_pointers_are_called_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(CheckpointError, match=rf"{name} holds no weights but a pointer of Git LFS; .*git lfs pull"):
        read_weights(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_never_runs(tensors: dict[str, Tensor], tmp_path: Path, legacy: bool) -> None:
    trap = Trap(tmp_path / "sprung")
    torch.save({"c": trap, **tensors}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "y.bin").write_bytes(pickle.dumps(trap))
    for name in ("x.pt", "y.bin"):
        with pytest.raises(CheckpointError, match="may be code"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_folders_without_clear_weights_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds none"):
        read_weights(tmp_path)
    save_file(tensors, tmp_path / "one.safetensors")
    assert same(read_weights(tmp_path), tensors)
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2: one.safetensors, two.safetensors"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        read_weights(tmp_path / "three.safetensors")


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_wrapped_training_files_give_the_model(tensors: dict[str, Tensor], tmp_path: Path, wrapper: str) -> None:
    inner = {f"module.{name}": tensor for name, tensor in tensors.items()}
    whole = {wrapper: inner, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3} if wrapper else inner
    torch.save(whole, tmp_path / "x.pth")
    assert same(unwrapped(read_weights(tmp_path / "x.pth")), tensors)


def make_lm(**sizes: int) -> MambaLM:
    lm = MambaLM(
        LLMConfig(**({"d_model": 16, "num_layers": 2, "vocab_size": 24} | sizes), tokenizer="", prompt="mamba")
    )
    lm.init_weights(torch.Generator().manual_seed(0))
    return lm


def test_heads_must_be_tied(tmp_path: Path) -> None:
    lm = make_lm()
    state = dict(lm.state_dict())
    for changed in (state, {name: t for name, t in state.items() if name != "lm_head.weight"}):
        found = mamba_weights(Weights.of(changed, "x"))
        assert "lm_head.weight" not in found and torch.equal(found["backbone.norm_f.weight"], torch.ones(16))
    without = {name: tensor for name, tensor in state.items() if "embedding" not in name}
    assert "backbone.embedding.weight" in mamba_weights(Weights.of(without, "x"))
    for other in (torch.zeros(24, 16), torch.zeros(25, 16)):
        with pytest.raises(CheckpointError, match="tied"):
            mamba_weights(Weights.of(state | {"lm_head.weight": other}, "x"))
    both = state | {"backbone.embeddings.weight": state["backbone.embedding.weight"]}
    with pytest.raises(CheckpointError, match="same tensor"):
        mamba_weights(Weights.of(both, "x"))


def test_meta_modules_are_filled_in_place_of_nothing(tmp_path: Path) -> None:
    lm = make_lm()
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    for dtype in (None, torch.float32, torch.bfloat16):
        with parameters_on_meta():
            empty = MambaLM(lm.config)
        assert all(parameter.is_meta for parameter in empty.parameters())
        load_llm(empty, str(tmp_path), "llm.weights", dtype=dtype)
        assert empty.lm_head.weight is empty.backbone.embedding.weight
        for name, parameter in empty.named_parameters():
            kept = name.endswith(("A_log", "D", "dt_proj.bias"))
            assert parameter.dtype == (torch.float32 if kept or dtype is None else dtype), name
            assert torch.equal(parameter, lm.get_parameter(name).to(parameter.dtype)), name
    assert not nn.Linear(2, 2).weight.is_meta  # only inside


def test_values_that_are_not_finite_are_named() -> None:
    lm = make_lm()
    state = dict(lm.state_dict())
    state["backbone.layers.1.mixer.D"] = torch.full((32,), float("nan"))
    state["backbone.norm_f.weight"] = torch.full((16,), float("-inf"))
    with pytest.raises(CheckpointError, match=r"NaN or infinite .*layers\.1\.mixer\.D, backbone\.norm_f\.weight \(2\)"):
        fill(lm, mamba_weights(Weights.of(state, "some.bin")))


def test_mamba_configs_of_both_layouts() -> None:
    original = {"d_model": 64, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    theirs = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50280, "state_size": 8, "time_step_rank": "auto"}
    assert mamba_sizes(original, "x") == {
        "d_model": 64,
        "num_layers": 2,
        "vocab_size": 50277,
        "pad_vocab_multiple": 8,
    }
    assert mamba_sizes(theirs, "x")["d_state"] == 8
    for wrong, message in (
        ({"d_model": 64}, "lacks n_layer, vocab_size"),
        (original | {"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer='Mamba2'"),
        (original | {"rms_norm": False}, "rms_norm=False"),
        (theirs | {"model_type": "mamba2"}, "model_type='mamba2'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            mamba_sizes(wrong, "config.json")


@pytest.mark.parametrize("wrapped", [False, True])
def test_position_tables_are_resampled_as_timm_does(tmp_path: Path, wrapped: bool) -> None:
    """DINOv2's, from 518 to 384 pixels: 37 x 37 to 27 x 27."""
    name = "vit_small_patch14_reg4_dinov2"
    source = timm.create_model(name, img_size=518, num_classes=0, init_values=1.0, **TINY_VIT)
    file = tmp_path / "x.pth"
    torch.save({"state_dict": source.state_dict(), "epoch": 1} if wrapped else source.state_dict(), file)
    theirs = timm.create_model(
        name,
        img_size=384,
        num_classes=0,
        init_values=1.0,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file), "hf_hub_id": None, "url": ""},
        **TINY_VIT,
    )
    args = TINY_VIT | {"init_values": 1.0}
    config = TowerConfig(timm=name, image_size=384, ignore_rest=True, args=args, weights=str(file))
    with parameters_on_meta():
        tower = VisionTower(replace(config, weights="random"))
    load_tower(tower, config, "vision.towers[0].weights")
    assert tower.model.pos_embed.shape == (1, 27 * 27, 32)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tower.model.state_dict()[key], tensor), key
    assert not any(tensor.is_meta for tensor in [*tower.parameters(), *tower.buffers()])


def test_classifiers_are_left_out(tmp_path: Path) -> None:
    name = "vit_base_patch16_224"
    source = timm.create_model(name, img_size=28, num_classes=10, **TINY_VIT)
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    config = TowerConfig(timm=name, image_size=28, args=TINY_VIT, weights=str(tmp_path / "x.safetensors"))
    tower = VisionTower(TowerConfig(timm=name, image_size=28, args=TINY_VIT, weights="random"))
    load_tower(tower, config, "vision.towers[0].weights")
    assert torch.equal(tower.model.pos_embed, source.pos_embed)
    wider = TowerConfig(timm=name, image_size=28, args=TINY_VIT | {"depth": 3}, weights="random")
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*missing: blocks\.2"):
        load_tower(VisionTower(wider), config, "vision.towers[0].weights")
