"""Runs of the public Cobra release: `config.json` and `checkpoints/latest-checkpoint.pt`, read and written.

Their config names parts by ids; the tables here say what the ids stand for. Only runs of the stage full-finetune hold
weights of the vision encoders; those of the others come from timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cobra.config import LLMConfig, ModelConfig, ProjectorConfig, VisionConfig, as_config, nearest
from cobra.errors import CheckpointError, ConfigError
from cobra.models.pretrained import load_llm, load_tower, mamba_weights, tower_weights, unwrapped
from cobra.models.readers import Weights, read_json, read_weights
from cobra.models.vision import VisionTower
from cobra.models.vlm import CobraVLM
from cobra.models.weights import check_keys, fill_parts, parameters_on_meta, self_contained

CHECKPOINT = Path("checkpoints") / "latest-checkpoint.pt"
_PREFIXES = ("projector.", "llm_backbone.", "vision_backbone.")  # of names in the checkpoint's `model`


def _tower(timm: str, image_size: int) -> dict[str, Any]:
    # 384 pixels are no multiple of the patch size 14: the public weights never saw the last 6.
    return {"timm": timm, "image_size": image_size, "ignore_rest": "patch14" in timm and image_size % 14 > 0}


# OpenAI trained CLIP with the quick approximation of GELU. SigLIP's tags are named: timm's default is now SigLIP 2.
_DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
_SIGLIP_384 = _tower("vit_so400m_patch14_siglip_384.webli", 384)
_SIGLIP_224 = _tower("vit_so400m_patch14_siglip_224.webli", 224)
_CLIP_336 = _tower("vit_large_patch14_clip_quickgelu_336.openai", 336)

VISION = {
    "dinosiglip-vit-so-384px": [_tower(_DINOV2, 384), _SIGLIP_384],
    "dinosiglip-vit-so-224px": [_tower(_DINOV2, 224), _SIGLIP_224],
    "dinoclip-vit-l-336px": [_tower(_DINOV2, 336), _CLIP_336],
    "siglip-vit-so400m-384px": [_SIGLIP_384],
    "siglip-vit-so400m": [_SIGLIP_224],
    "siglip-vit-b16-224px": [_tower("vit_base_patch16_siglip_224.webli", 224)],
    "siglip-vit-b16-256px": [_tower("vit_base_patch16_siglip_256.webli", 256)],
    "siglip-vit-b16-384px": [_tower("vit_base_patch16_siglip_384.webli", 384)],
    "dinov2-vit-l": [_tower(_DINOV2, 224)],
    "clip-vit-b": [_tower("vit_base_patch16_clip_quickgelu_224.openai", 224)],
    "clip-vit-l": [_tower("vit_large_patch14_clip_quickgelu_224.openai", 224)],
    "clip-vit-l-336px": [_CLIP_336],
    "in1k-vit-l": [_tower("vit_large_patch16_224.augreg_in21k_ft_in1k", 224)],
}


def _mamba(
    weights: str, d_model: int, num_layers: int, vocab_size: int = 50277, prompt: str = "mamba"
) -> dict[str, Any]:
    sizes = {"d_model": d_model, "num_layers": num_layers, "vocab_size": vocab_size}
    return sizes | {"weights": weights, "tokenizer": "EleutherAI/gpt-neox-20b", "prompt": prompt}


LLMS = {
    "mamba-130m": _mamba("state-spaces/mamba-130m", 768, 24),
    "mamba-370m": _mamba("state-spaces/mamba-370m", 1024, 48),
    "mamba-790m": _mamba("state-spaces/mamba-790m", 1536, 48),
    "mamba-1.4b": _mamba("state-spaces/mamba-1.4b", 2048, 48),
    "mamba-2.8b": _mamba("state-spaces/mamba-2.8b", 2560, 64),
    "mamba-2.8b-slimpj": _mamba("state-spaces/mamba-2.8b-slimpj", 2560, 64),
    "mamba-2.8b-zephyr": _mamba("xiuyul/mamba-2.8b-zephyr", 2560, 64, prompt="zephyr"),
    "mamba-7b-rw": _mamba("TRI-ML/mamba-7b-rw", 4096, 64, vocab_size=50432),
}

PROJECTORS = {
    "linear": "linear",
    "gelu-mlp": "gelu-mlp",
    "fused-gelu-mlp": "fused-gelu-mlp",
    "fused-ldpnet": "fused-ldpv2",
}


def is_public_run(folder: Path) -> bool:
    """Whether a folder is a run in the public layout."""
    return (folder / "config.json").is_file() and (folder / CHECKPOINT).is_file()


def public_config(folder: Path, vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None) -> ModelConfig:
    """Return what the ids in a public run's config stand for.

    Args:
        folder: the run.
        vision: settings of VisionConfig that replace those of the vision id; with `towers` the id may be unknown.
        llm: settings of LLMConfig, likewise; with sizes, tokenizer and prompt the id may be unknown.

    Raises:
        CheckpointError: the file is no such config, or an id is unknown and not described.
    """
    file = folder / "config.json"
    model = read_json(file).get("model")
    keys = ("arch_specifier", "vision_backbone_id", "llm_backbone_id", "image_resize_strategy")
    if not isinstance(model, Mapping) or any(not isinstance(model.get(key), str) for key in keys):
        lacking = keys if not isinstance(model, Mapping) else [k for k in keys if not isinstance(model.get(k), str)]
        raise CheckpointError(f"{file} is not the config of a public Cobra run: 'model' lacks {', '.join(lacking)}.")
    arch, vision_id, llm_id, resize = (str(model[key]) for key in keys)
    kind = PROJECTORS.get(arch.split("+")[-1])
    if kind is None:
        raise CheckpointError(f"{file}: arch_specifier={arch!r} is unknown; known endings: {', '.join(PROJECTORS)}.")
    if vision_id not in VISION and "towers" not in (vision or {}):
        raise CheckpointError(_unknown(file, "vision_backbone_id", vision_id, VISION, "vision={'towers': [...]}"))
    if llm_id not in LLMS and "d_model" not in (llm or {}):
        raise CheckpointError(_unknown(file, "llm_backbone_id", llm_id, LLMS, "llm={'d_model': ..., ...}"))
    max_length = model.get("llm_max_length")
    max_length = 2048 if max_length is None else max_length
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise CheckpointError(
            f"{file}: llm_max_length={max_length!r} must be a whole number of tokens above 0, such as 2048; "
            "correct it, or leave it out."
        )
    towers = {"towers": VISION[vision_id]} if vision_id in VISION else {}
    try:
        return ModelConfig(
            name=str(model.get("model_id") or folder.name),
            vision=as_config(VisionConfig, towers | {"resize": resize} | dict(vision or {})),
            projector=ProjectorConfig(kind=kind),
            llm=as_config(LLMConfig, LLMS.get(llm_id, {}) | dict(llm or {})),
            max_length=max_length,
        )
    except ConfigError as error:
        raise CheckpointError(f"{file} and the vision= and llm= beside it do not describe a model: {error}") from None


def _unknown(file: Path, key: str, value: str, known: Mapping[str, object], remedy: str) -> str:
    return (
        f"{file}: {key}={value!r} is unknown.{nearest(value, known)} Known: {', '.join(known)}. "
        f"Describe the part yourself with {remedy}, a mapping or a YAML file."
    )


def load_public_run(
    folder: Path, config: ModelConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> CobraVLM:
    """Build the model of a public run with its weights; `config` is what `public_config` made of it.

    Encoders that the run itself holds, as it does after the stage full-finetune, win over those that the config names.

    Raises:
        CheckpointError: weights are missing, damaged or do not fit; all the run's keys that do not are listed together.
    """
    weights = unwrapped(read_weights(folder / CHECKPOINT))
    projector, llm, vision = map(weights.below, _PREFIXES)
    if not projector:
        raise CheckpointError(
            f"{folder / CHECKPOINT} holds no model.projector; it is no public Cobra checkpoint. Fetch the run again."
        )
    first = projector.shapes.get("projector.0.weight", ())
    if config.projector.kind.startswith("fused") and len(first) == 2 and 0 not in first:
        expansion, rest = divmod(*first)  # told by no id
        if rest == 0:
            config = replace(config, projector=replace(config.projector, expansion=expansion))
    with parameters_on_meta():
        model = CobraVLM(self_contained(config))  # vision weights are loaded below, not by timm
    model.config = config
    strays = weights.renamed(lambda name: None if name.startswith(_PREFIXES) else name)
    parts: list[tuple[nn.Module, Weights]] = [(model.projector, projector), (nn.Module(), strays)]
    if llm:
        parts.append((model.llm, mamba_weights(llm)))
    if vision:
        parts += _trained_towers(model, vision)
    check_keys(parts)  # before the files of other parts are fetched; the run's own weights are read last
    if not llm:  # after the align stage only the projector is stored
        load_llm(model.llm, config.llm.weights, "llm.weights", device=device, dtype=dtype)
    if not vision:
        for i, (tower, settings) in enumerate(zip(model.vision.towers, config.vision.towers, strict=True)):
            load_tower(tower, settings, f"vision.towers[{i}].weights", device=device, dtype=dtype)  # type: ignore[arg-type]
    fill_parts(parts, device=device, dtype=dtype)
    return model.to(device)


def featurizers(config: VisionConfig) -> list[str]:
    """Return what the public release calls the towers inside `vision_backbone`: DINOv2 comes first where there are two.

    Raises:
        CheckpointError: it has no names for so many.
    """
    if len(config.towers) > 2:
        raise CheckpointError(
            f"The public layout has names for the trained weights of one or two encoders, not for {len(config.towers)}."
        )
    if len(config.towers) == 1:
        return ["featurizer"]
    return ["dino_featurizer", "clip_featurizer" if "_clip_" in config.towers[1].timm else "siglip_featurizer"]


def _trained_towers(model: CobraVLM, vision: Weights) -> list[tuple[nn.Module, Weights]]:
    """Return the towers with their weights from a run's `vision_backbone`."""
    names = featurizers(model.config.vision)
    others = sorted({name.split(".")[0] for name in vision} - {*names})
    if others:
        raise CheckpointError(
            f"{vision.origin} also holds {', '.join(f'vision_backbone.{name}' for name in others)}; the towers of this "
            f"config are called {', '.join(names)} there. Give vision= with the towers that the run was trained with, "
            "in their order."
        )
    parts: list[tuple[nn.Module, Weights]] = []
    for name, tower, settings in zip(names, model.vision.towers, model.config.vision.towers, strict=True):
        assert isinstance(tower, VisionTower)
        parts.append((tower.model, tower_weights(tower, vision.below(f"{name}."), settings.timm)))
    return parts


def public_ids(config: ModelConfig) -> dict[str, Any]:
    """Return the `model` section of a public run's config.json for a model; ids nobody knows are named `custom`.

    Whether a part is the one that an id stands for is told by its sizes.
    """
    kinds = {ours: theirs for theirs, ours in PROJECTORS.items()}
    if config.projector.kind not in kinds or config.projector.grid is not None:
        raise CheckpointError(
            f"The public layout has no name for model.projector.kind={config.projector.kind} with "
            f"grid={config.projector.grid}; it knows {', '.join(kinds)}, with grid null. Use to=cobra."
        )

    def encoders(vision: VisionConfig) -> list[object]:
        return [(tower.timm.split(".")[0], tower.image_size, tower.layer, tower.args) for tower in vision.towers]

    def sizes(llm: LLMConfig) -> LLMConfig:
        return replace(llm, weights="random", tokenizer="", init="mamba", dt_rank=llm.rank)

    visions = {name: encoders(as_config(VisionConfig, {"towers": towers})) for name, towers in VISION.items()}
    llms = {name: sizes(as_config(LLMConfig, settings)) for name, settings in LLMS.items()}
    vision_id = next((name for name, parts in visions.items() if parts == encoders(config.vision)), "custom")
    llm_id = next((name for name, llm in llms.items() if llm == sizes(config.llm)), "custom")
    if llm_id == "mamba-2.8b":  # the same sizes as slimpj: which of the two it was is not known
        llm_id = "mamba-2.8b-slimpj"
    return {
        "model_id": config.name,
        "arch_specifier": f"no-align+{kinds[config.projector.kind]}",
        "vision_backbone_id": vision_id,
        "llm_backbone_id": llm_id,
        "image_resize_strategy": config.vision.resize,
        "llm_max_length": config.max_length,
    }
