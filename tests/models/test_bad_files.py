"""Files that are wrong in ways a library does not see: every one is refused by name, nothing is dropped in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from cobra.config import LLMConfig, ProjectorConfig, TowerConfig, VisionConfig, as_config
from cobra.convert import convert
from cobra.errors import CheckpointError
from cobra.loading import settings
from cobra.models.mamba import MambaLM
from cobra.models.pretrained import load_llm, load_tower, mamba_sizes, mamba_weights, unwrapped
from cobra.models.public import LLMS, VISION, featurizers, load_public_run, public_config, public_ids
from cobra.models.readers import Weights, read_json, read_weights
from cobra.models.vision import VisionTower
from cobra.models.vlm import CobraVLM
from cobra.models.weights import assign, save_model_folder
from cobra.text.tokenizer import Tokenizer

HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"


def make_lm() -> MambaLM:
    lm = MambaLM(LLMConfig(d_model=16, num_layers=2, vocab_size=24, tokenizer="", prompt="mamba"))
    lm.init_weights(torch.Generator().manual_seed(0))
    return lm


# Readers.


def looped() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    return loop


def doubled(levels: int) -> dict[str, Any]:
    """A few dicts, each twice in the next one: small in the file, endless when walked through."""
    node: dict[str, Any] = {}
    for _ in range(levels):
        node = {"a": node, "b": node}
    return node


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.ones(2), "wrong": looped()}, "without end, below wrong.self"),
        ({"wrong": doubled(30)}, "without end, below wrong"),
        ({"wrong": torch.eye(3).to_sparse()}, "wrong is sparse_coo, not a dense tensor"),
        ({"a": {"wrong": torch.ones(2, device="meta")}}, r"a\.wrong is without values"),
        ({"a.wrong": torch.ones(1), "a": {"wrong": torch.ones(1)}}, r"two tensors of the name a\.wrong"),
        ({"a": {0: torch.ones(1), "0": torch.ones(1)}}, r"two tensors of the name a\.0"),
    ],
)
def test_strange_torch_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(caught.value) and "save" in str(caught.value)


def test_tensors_in_lists_are_seen(tmp_path: Path) -> None:
    torch.save({"a": [torch.ones(1), {"b": (torch.zeros(2), 3)}]}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").shapes == {"a.0": (1,), "a.1.b.0": (2,)}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "1" * 5000 + "}", "\udc80"])
def test_strange_json_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json .*etch or write it again"):
        read_json(file)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["s" * 500, "a\0b"])
def test_shards_of_impossible_names_are_missing(name: str, tmp_path: Path) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match="names 1 files that are missing"):
        read_weights(tmp_path)


def test_tensors_that_an_index_leaves_out_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(1), "c": torch.ones(1)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "c": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"does not name .*: b \(1\.safetensors\), a \(2\.safetensors\)\. Fetch"):
        read_weights(tmp_path)


# Keys and types.


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_other_types_are_listed_with_the_other_problems(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    lm, file = make_lm(), tmp_path / f"x.{suffix}"
    state = {name: tensor for name, tensor in lm.state_dict().items() if name != HEAD}
    state["backbone.layers.1.mixer.D"] = torch.ones(32).to(dtype)
    del state["backbone.norm_f.weight"]
    (save_file if suffix == "safetensors" else torch.save)(state, file)
    with pytest.raises(CheckpointError, match=re.escape(f"{file} does not fit")) as caught:
        load_llm(lm, str(file), "llm.weights")
    message, name = str(caught.value), str(dtype).removeprefix("torch.")
    assert "missing: backbone.norm_f.weight (1)" in message
    assert f"wrong type: backbone.layers.1.mixer.D {name} (needs a float" in message


def test_keys_are_named_as_the_file_names_them(tmp_path: Path) -> None:
    lm = make_lm()
    inside = {f"module.llm.{name}": tensor for name, tensor in lm.state_dict().items()}
    inside["module.llm.backbone.norm_f.weight"] = torch.ones(3)
    del inside["module.llm.backbone.layers.0.mixer.D"]
    torch.save({"state_dict": inside, "ema": torch.ones(1), "optimizer": {"x": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        load_llm(lm, str(tmp_path / "x.pt"), "llm.weights")
    prefix = "state_dict.module.llm.backbone"
    assert f"missing: {prefix}.layers.0.mixer.D (1); unexpected: ema (1); " in str(caught.value)
    assert f"wrong shape: {prefix}.norm_f.weight [3] (needs [16]) (1)" in str(caught.value)
    assert "optimizer" not in str(caught.value) and "?" not in str(caught.value)


def test_what_lies_beside_wrapped_weights_is_not_dropped() -> None:
    one = torch.ones(1)
    found = unwrapped(Weights.of({"model.w": one, "optimizer.state.0.x": one, "rng.cpu": one, "teacher.w": one}, "x"))
    assert [*found] == ["w", "teacher.w"] and found.source("w") == "model.w"
    with pytest.raises(CheckpointError, match=r"model\.w and w, which mean the same tensor; remove one"):
        unwrapped(Weights.of({"model.w": one, "w": one}, "x"))


def test_only_known_names_behind_the_blocks_are_left_out(tmp_path: Path) -> None:
    args = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = TowerConfig(timm="vit_base_patch16_224", image_size=28, args=args, weights=str(tmp_path / "x.pt"))
    state = timm.create_model(config.timm, img_size=28, num_classes=10, **args).state_dict()
    behind = {"head_dist.weight": torch.ones(1), "fc_norm.bias": torch.ones(32), "attn_pool.q.weight": torch.ones(1)}
    tower = VisionTower(config)
    torch.save(state | behind, tmp_path / "x.pt")
    load_tower(tower, config, "x")
    torch.save(state | {"head.extra": torch.ones(1), "norm.0.running": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"unexpected: head\.extra, norm\.0\.running \(2\)"):
        load_tower(tower, config, "x")


# Mamba.


def test_heads_of_another_precision_are_tied() -> None:
    state = dict(make_lm().state_dict())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert HEAD not in mamba_weights(Weights.of(state | {HEAD: state[HEAD].to(dtype)}, "x"))
        assert HEAD not in mamba_weights(Weights.of(state | {EMBEDDING: state[EMBEDDING].to(dtype)}, "x"))
    with pytest.raises(CheckpointError, match="int64 is not equal"):
        mamba_weights(Weights.of(state | {HEAD: state[HEAD].long()}, "x"))


def test_nan_in_a_tied_head_is_called_nan() -> None:
    lm = make_lm()
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    for broken in ((HEAD, EMBEDDING), (EMBEDDING,), (HEAD,)):
        changed = state | {name: torch.full_like(state[name], float("nan")) for name in broken}
        with pytest.raises(CheckpointError, match=rf"NaN or infinite numbers in {broken[-1]} \(1\)"):
            assign(lm, mamba_weights(Weights.of(changed, "x")), "x")


SIZES = {"d_model": 64, "n_layer": 2, "vocab_size": 100, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssm_cfg": [1]}, r"ssm_cfg=\[1\]"),
        ({"ssm_cfg": {"d_state": "16"}}, "d_state='16'"),
        ({"norm_epsilon": None}, "norm_epsilon=None"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon=nan"),
        ({"n_layer": True, "vocab_size": 0}, "n_layer=True, vocab_size=0"),
        ({"pad_vocab_size_multiple": 8.5}, "pad_vocab_size_multiple=8.5"),
    ],
)
def test_sizes_that_are_none_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"some/config.json: {message}"):
        mamba_sizes(SIZES | change, "some/config.json")


# Public runs.


@pytest.fixture
def run(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A public run whose parts are described beside it."""
    save_model_folder(small_model, tokenizer.file, tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "run", "public")
    return tmp_path / "run"


def change_run(run: Path, change: Callable[[dict[str, dict[str, Tensor]]], object]) -> Path:
    file = run / "checkpoints" / "latest-checkpoint.pt"
    content = torch.load(file, weights_only=True)
    change(content["model"])
    torch.save(content, file)
    return file


def load_run(run: Path) -> CobraVLM:
    vision, llm = (settings(run / f"{part}.yaml", part) for part in ("vision", "llm"))
    return load_public_run(run, public_config(run, vision, llm))


@pytest.mark.parametrize("value", ["many", [2048], True, 0, 20.5])
def test_wrong_lengths_are_refused(value: object, run: Path) -> None:
    content = read_json(run / "config.json")
    content["model"]["llm_max_length"] = value
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json: llm_max_length=.*; correct it"):
        load_run(run)


def test_every_key_of_a_run_is_reported_at_once(run: Path) -> None:
    def change(parts: dict[str, dict[str, Tensor]]) -> None:
        parts["projector"]["projector.0.weight"] = torch.ones(0, 0)
        parts["projector"]["extra"] = torch.ones(1)
        parts["adapter"] = {"w": torch.ones(1)}
        del parts["llm_backbone"]["llm.backbone.norm_f.weight"]
        parts["llm_backbone"]["llm.backbone.layers.0.mixer.D"] = torch.ones(64, dtype=torch.int64)

    file = change_run(run, change)
    with pytest.raises(CheckpointError, match=re.escape(f"{file} does not fit the model: ")) as caught:
        load_run(run)
    for problem in (
        "missing: model.llm_backbone.llm.backbone.norm_f.weight (1)",
        "unexpected: model.projector.extra, model.adapter.w (2)",
        "wrong shape: model.projector.projector.0.weight [0, 0] (needs [",
        "wrong type: model.llm_backbone.llm.backbone.layers.0.mixer.D int64",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("num_towers", [1, 2])
def test_trained_encoders_of_a_run_are_loaded(num_towers: int, run: Path, small_model: CobraVLM) -> None:
    """As the stage full-finetune leaves them; the files that vision= names are not even looked for."""
    vision = yaml.safe_load((run / "vision.yaml").read_text())
    vision["towers"] = [tower | {"weights": "absent.pt"} for tower in vision["towers"][:num_towers]]
    (run / "vision.yaml").write_text(yaml.safe_dump(vision))
    names = featurizers(as_config(VisionConfig, vision))
    assert names == (["featurizer"] if num_towers == 1 else ["dino_featurizer", "siglip_featurizer"])
    trained = {
        f"{name}.{key}": tensor + 1
        for name, tower in zip(names, small_model.vision.towers, strict=False)
        for key, tensor in tower.model.state_dict().items()
    }

    def change(parts: dict[str, Any]) -> None:
        parts["vision_backbone"] = trained
        if num_towers == 1:  # half the features: 64, widened four times
            width = parts["projector"]["projector.2.weight"].shape[0]
            parts["projector"]["projector.0.weight"] = torch.ones(256, 64)
            parts["projector"]["projector.0.bias"] = torch.ones(256)
            parts["projector"]["projector.2.weight"] = torch.ones(width, 256)

    change_run(run, change)
    found = load_run(run).vision.towers
    for name, tower in zip(names, found, strict=True):
        for key, tensor in tower.model.state_dict().items():
            assert torch.equal(tensor, trained[f"{name}.{key}"]), key
    last = f"{names[-1]}.blocks.1.mlp.fc1.weight"
    change_run(run, lambda parts: parts["vision_backbone"].pop(last))
    with pytest.raises(CheckpointError, match=re.escape(f"missing: model.vision_backbone.{last} (1)")):
        load_run(run)


def test_encoders_that_a_run_was_not_trained_with_are_refused(run: Path) -> None:
    change_run(run, lambda parts: parts.update(vision_backbone={"featurizer.pos_embed": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"holds vision_backbone\.featurizer; .* dino_featurizer, siglip_featuri"):
        load_run(run)
    tower = TowerConfig(timm="vit_tiny_patch16_224", image_size=64)
    with pytest.raises(CheckpointError, match="one or two encoders, not for 3"):
        featurizers(VisionConfig(towers=[tower] * 3))
    clip = replace(tower, timm="vit_large_patch14_clip_quickgelu_336.openai")
    assert featurizers(VisionConfig(towers=[tower, clip])) == ["dino_featurizer", "clip_featurizer"]


def test_ids_stand_for_exact_sizes(small_model: CobraVLM) -> None:
    vision = as_config(VisionConfig, {"towers": VISION["dinosiglip-vit-so-384px"]})
    llm = as_config(LLMConfig, LLMS["mamba-2.8b-zephyr"])
    config = replace(small_model.config, vision=vision, llm=llm, projector=ProjectorConfig(kind="fused-gelu-mlp"))
    ids = public_ids(config)
    assert (ids["vision_backbone_id"], ids["llm_backbone_id"]) == ("dinosiglip-vit-so-384px", "mamba-2.8b-zephyr")
    assert public_ids(replace(config, llm=replace(llm, dt_rank=llm.rank, init="small"))) == ids
    assert public_ids(replace(config, llm=replace(llm, dt_rank=8)))["llm_backbone_id"] == "custom"
    last = [replace(tower, layer=-1) for tower in vision.towers]
    assert public_ids(replace(config, vision=replace(vision, towers=last)))["vision_backbone_id"] == "custom"
