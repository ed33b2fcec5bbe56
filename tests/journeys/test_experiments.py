"""Every experiment has the paper's settings, and the tiny ones train."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cobra.config import LoraConfig, PretrainConfig
from cobra.describe import build_on_meta
from cobra.errors import CheckpointError
from cobra.models.build import TRAINED_PARTS
from cobra.train.run import pretrain

EXPERIMENTS = Path(__file__).resolve().parents[2] / "configs" / "experiment"
Compose = Callable[..., PretrainConfig]

# The paper, Table 1 and section 4.1.
FINETUNE = {
    "stage": "finetune",
    "epochs": 2,
    "max_steps": None,
    "global_batch_size": 128,
    "learning_rate": 2e-5,
    "weight_decay": 0.1,
    "warmup_ratio": 0.03,
    "max_grad_norm": 1.0,
}
ONE_EPOCH = FINETUNE | {"epochs": 1}
ALIGN = ONE_EPOCH | {"stage": "align", "global_batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0.0}

DINOV2, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"
ZEPHYR, SLIMPJ, RW = "xiuyul/mamba-2.8b-zephyr", "state-spaces/mamba-2.8b-slimpj", "TRI-ML/mamba-7b-rw"
BOTH = (DINOV2, SIGLIP)

# experiment: recipe, encoders, projector, image tokens, language model, prompt (the paper, sections 3 and 4.4)
PAPER: dict[str, tuple[dict[str, Any], tuple[str, ...], str, int, str, str]] = {
    "cobra-3b": (FINETUNE, BOTH, "fused-gelu-mlp", 729, ZEPHYR, "zephyr"),
    "cobra-8b": (FINETUNE, BOTH, "fused-gelu-mlp", 729, RW, "mamba"),
    "cobra-3b-siglip": (FINETUNE, (SIGLIP,), "gelu-mlp", 729, ZEPHYR, "zephyr"),
    "cobra-3b-ldpv2": (FINETUNE, BOTH, "fused-ldpv2", 196, ZEPHYR, "zephyr"),
    "cobra-3b-base": (FINETUNE, BOTH, "fused-gelu-mlp", 729, SLIMPJ, "mamba"),
    "cobra-3b-one-epoch": (ONE_EPOCH, BOTH, "fused-gelu-mlp", 729, ZEPHYR, "zephyr"),
    "cobra-3b-align": (ALIGN, BOTH, "fused-gelu-mlp", 729, ZEPHYR, "zephyr"),
    "cobra-3b-aligned": (ONE_EPOCH, BOTH, "fused-gelu-mlp", 729, ZEPHYR, "zephyr"),
}
# Not in the paper: adapters on one GPU; what one stage learns of the paper's recipe stays.
LORA = ONE_EPOCH | {"learning_rate": 2e-4, "weight_decay": 0.0}
OURS = {"cobra-3b-lora": (LORA, BOTH, "fused-gelu-mlp", 729, ZEPHYR, "zephyr")}
FULL_SIZE = PAPER | OURS
TINY = sorted(path.stem for path in EXPERIMENTS.glob("tiny*.yaml"))
OWN = {"tiny-toy", "tiny-full"}  # of no full-size experiment


def test_every_experiment_is_tested() -> None:
    names = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
    assert names == FULL_SIZE.keys() | set(TINY)
    # every variation can be tried at the tiny size
    assert {name.removeprefix("cobra-3b") for name in FULL_SIZE if name != "cobra-8b"} == {
        name.removeprefix("tiny") for name in TINY if name not in OWN
    }


@pytest.mark.parametrize("name", FULL_SIZE)
def test_experiment_has_the_papers_settings(tiny_config: Compose, name: str) -> None:
    config = tiny_config(f"+experiment={name}")
    train, towers, projector, image_tokens, weights, prompt = FULL_SIZE[name]
    assert {key: getattr(config.train, key) for key in train} == train
    assert config.train.per_device_batch_size * 8 <= config.train.global_batch_size  # eight GPUs
    assert config.train.betas == [0.9, 0.999]  # PyTorch's; the paper has none
    assert (config.train.lora is not None) == (name in OURS)
    assert config.parallel.processes == (1 if name in OURS else None)
    assert (config.parallel.precision, config.parallel.recompute) == ("bf16", 1)
    assert config.run.name == config.model.name == name
    model = config.model
    assert len(model.vision.towers) == len(towers) and model.vision.resize == "resize-naive"
    for tower, wanted in zip(model.vision.towers, towers, strict=True):
        assert tower.timm.startswith(wanted)
        assert (tower.image_size, tower.layer, tower.weights) == (384, -2, "timm")
    assert model.projector.kind == projector
    assert (model.llm.weights, model.llm.prompt, model.llm.tokenizer) == (weights, prompt, "EleutherAI/gpt-neox-20b")
    assert model.max_length == 2048
    built = build_on_meta(model)
    with torch.no_grad():
        features = torch.empty(1, built.vision.num_patches, built.vision.width, device="meta")
        assert built.projector(features).shape == (1, image_tokens, model.llm.d_model)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_only_the_second_stage_starts_from_a_run(tiny_config: Compose, name: str) -> None:
    config = tiny_config(f"+experiment={name}", "paths.runs=/runs", "paths.data=/data")
    assert config.init_from == ("/runs/cobra-3b-align" if name == "cobra-3b-aligned" else None)
    folder = "llava-laion-cc-sbu-558k" if name == "cobra-3b-align" else "llava-v1.5-instruct"
    (files,) = config.data.sets.values()
    assert Path(files.annotations).parent == Path(files.images) == Path("/data") / folder
    assert config.data.source is None


def test_tiny_experiments_vary_what_their_names_say(tiny_config: Compose) -> None:
    configs = {name: tiny_config(f"+experiment={name}") for name in TINY}
    assert all(config.run.name == config.model.name == name for name, config in configs.items())
    tiny, full = configs["tiny"], configs["tiny-full"]
    assert full.train == replace(configs["tiny-toy"].train, max_steps=full.train.max_steps)
    assert configs["tiny-siglip"].model.vision.towers == full.model.vision.towers[1:]
    assert configs["tiny-siglip"].model.projector.kind == "gelu-mlp"
    assert configs["tiny-ldpv2"].model.projector == replace(full.model.projector, kind="fused-ldpv2")
    assert configs["tiny-base"].model.llm.init != full.model.llm.init
    for name in ("tiny-siglip", "tiny-ldpv2", "tiny-base"):
        assert (configs[name].data, configs[name].train) == (full.data, full.train)
    for name in ("tiny-one-epoch", "tiny-aligned"):
        assert configs[name].train == replace(full.train, epochs=1, max_steps=None)
    assert configs["tiny-lora"].train == replace(tiny.train, weight_decay=0.0, lora=LoraConfig())
    assert configs["tiny-align"].train.stage == "align"
    assert configs["tiny-aligned"].init_from == str(Path(tiny.paths.runs) / "tiny-align")


def overrides(small_data: Any, runs: Path) -> list[str]:
    """Three steps on drawn images instead of easy-VQA; the model stays as it is."""
    return [
        *small_data.overrides,
        f"data.annotations={small_data.captions}",  # an image in every row, as the align stage needs it
        f"paths.runs={runs}",
        "parallel.device=cpu",
        "train.global_batch_size=4",
        "train.per_device_batch_size=4",
        "train.max_steps=3",
        "train.log_every=1",
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("name", [name for name in TINY if name != "tiny-aligned"])
def test_tiny_experiment_trains(tiny_config: Compose, small_data: Any, tmp_path: Path, name: str) -> None:
    config = tiny_config(f"+experiment={name}", *overrides(small_data, tmp_path))
    run = pretrain(config)
    assert run == tmp_path / name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert json.loads((run / "model" / "config.json").read_text())["name"] == name
    assert not [key for key in weights(run) if "adapter" in key]  # merged


def test_second_stage_goes_on_from_the_first(tiny_config: Compose, small_data: Any, tmp_path: Path) -> None:
    first = pretrain(tiny_config("+experiment=tiny-align", *overrides(small_data, tmp_path)))
    second_config = tiny_config(
        "+experiment=tiny-aligned", *overrides(small_data, tmp_path), "train.learning_rate=1e-9"
    )
    second = weights(pretrain(second_config))  # so slow that it stays where it started
    fresh = pretrain(tiny_config("+experiment=tiny-full", *overrides(small_data, tmp_path), "train.learning_rate=1e-9"))
    start = weights(fresh)
    changed = {key.split(".")[0] for key, tensor in weights(first).items() if not torch.allclose(tensor, start[key])}
    assert changed == set(TRAINED_PARTS["align"])
    for key, tensor in weights(first).items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=1e-7)


def test_second_stage_without_the_first_names_the_run(tiny_config: Compose, small_data: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tiny-align; train one"):
        pretrain(tiny_config("+experiment=tiny-aligned", *overrides(small_data, tmp_path)))
    assert not (tmp_path / "tiny-aligned").exists()
