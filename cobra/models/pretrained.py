"""Pretrained parts from wherever a user has them: timm's encoders, and Mamba in its two public layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cobra.config import LLMConfig, TowerConfig
from cobra.errors import CheckpointError, ConfigError
from cobra.hub import resolve_weights
from cobra.models.mamba import MambaLM
from cobra.models.readers import Weights, read_weights
from cobra.models.vision import VisionTower
from cobra.models.weights import TIED, fill

EMBEDDING = "backbone.embedding.weight"

# Training files wrap the weights: {"state_dict": ..., "epoch": ...}. Averaged ones first, as timm does.
_WRAPPERS = ("state_dict_ema.", "model_ema.", "state_dict.", "model.")
# What comes after the last block: the features are taken before it, so a tower may lack it.
_AFTER_THE_BLOCKS = ("head.", "head_dist.", "attn_pool.", "fc_norm.", "norm.")


def load_tower(
    tower: VisionTower,
    config: TowerConfig,
    setting: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Load an encoder's weights, with its position table resampled to the tower's image size as timm does it.

    Raises:
        CheckpointError: there are no weights, or they do not fit; the message names `setting`.
    """
    name = config.weights
    if name == "timm":
        name = _published(tower.model.pretrained_cfg, config.timm)  # type: ignore[arg-type]
    weights = unwrapped(read_weights(resolve_weights(name, setting)))
    try:
        tensors = tower.adapt_weights(weights)
    except (RuntimeError, KeyError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise CheckpointError(f"{weights.origin} does not fit {config.timm}: {error}") from None
    wanted = tower.model.state_dict()
    kept = {key: value for key, value in tensors.items() if key in wanted or not key.startswith(_AFTER_THE_BLOCKS)}
    fill(tower.model, Weights.of(kept, weights.origin), device=device, dtype=dtype)


def _published(pretrained_cfg: Mapping[str, Any], name: str) -> str:
    hub_id = pretrained_cfg.get("hf_hub_id")
    if not hub_id:
        raise ConfigError(
            f"timm publishes no weights for {name!r}; name a tag, such as 'vit_...dinov2.lvd142m', or a local file as "
            "model.vision.towers[].weights."
        )
    return hub_id


def unwrapped(weights: Weights) -> Weights:
    """Return the weights inside a training file's wrapping, without prefixes of data-parallel or compiled modules."""
    for prefix in _WRAPPERS:
        if any(name.startswith(prefix) for name in weights):
            weights = weights.below(prefix)
            break
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = weights.below(prefix)
    return weights


def load_llm(
    llm: MambaLM, name: str, setting: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Load a Mamba's weights from a file, a folder or a Hub id, in any layout.

    Raises:
        CheckpointError: there are no weights, or they do not fit; the message names `setting`.
    """
    fill(llm, mamba_weights(read_weights(resolve_weights(name, setting))), device=device, dtype=dtype)


def mamba_weights(weights: Weights) -> Weights:
    """Return a Mamba's weights under this model's names, the tied head left out.

    Raises:
        CheckpointError: the head is not the embedding: such a model needs a head of its own, which ours has not.
    """
    weights = unwrapped(weights)
    if any(name.startswith("llm.") for name in weights):  # a whole model of ours
        weights = weights.below("llm.")
    weights = weights.renamed(lambda name: name.replace("backbone.embeddings.", "backbone.embedding.", 1))
    if TIED in weights and EMBEDDING not in weights:
        weights = weights.renamed(lambda name: EMBEDDING if name == TIED else name)
    if TIED in weights and not torch.equal(weights[TIED], weights[EMBEDDING]):
        raise CheckpointError(
            f"{weights.origin}: {TIED} {list(weights.shapes[TIED])} is not equal to {EMBEDDING} "
            f"{list(weights.shapes[EMBEDDING])}; Mamba's output head is tied to its embedding here, so this model "
            "cannot be read without changing it."
        )
    return weights.renamed(lambda name: None if name == TIED else name)


def mamba_sizes(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the LLMConfig settings that a Mamba's own `config.json`, of either layout, stands for.

    Raises:
        CheckpointError: it describes no Mamba-1, or one with parts that ours does not have.
    """
    inner: Mapping[str, Any] = config.get("ssm_cfg") or {}
    is_original = "d_model" in config
    keys = {
        "d_model": "d_model" if is_original else "hidden_size",
        "num_layers": "n_layer" if is_original else "num_hidden_layers",
        "vocab_size": "vocab_size",
    }
    missing = [key for key in keys.values() if not isinstance(config.get(key), int)]
    if missing:
        raise CheckpointError(f"{origin} does not describe a Mamba: it lacks {', '.join(missing)}.")
    sizes: dict[str, Any] = {ours: config[theirs] for ours, theirs in keys.items()}
    optional = (
        {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "dt_rank": "dt_rank"}
        if is_original
        else {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
    )
    source = inner if is_original else config
    sizes |= {ours: source[theirs] for ours, theirs in optional.items() if source.get(theirs) not in (None, "auto")}
    for key in ("norm_epsilon", "layer_norm_epsilon"):
        if key in config:
            sizes["norm_eps"] = float(config[key])
    # In the Hugging Face layout the vocabulary is what the embedding has rows, padding included.
    sizes["pad_vocab_multiple"] = config.get("pad_vocab_size_multiple", 8) if is_original else 1
    refused = [
        f"{key}={value!r}"
        for key, value, allowed in (
            ("rms_norm", config.get("rms_norm", True), (True,)),
            ("ssm_cfg.layer", inner.get("layer", "Mamba1"), ("Mamba1",)),
            ("use_bias", config.get("use_bias", False), (False,)),
            ("use_conv_bias", config.get("use_conv_bias", True), (True,)),
            ("hidden_act", config.get("hidden_act", "silu"), ("silu", "swish")),
            ("model_type", config.get("model_type", "mamba"), ("mamba",)),
            ("attn_layer_idx", config.get("attn_layer_idx", []), ([], None)),
            ("d_intermediate", config.get("d_intermediate", 0), (0,)),
        )
        if value not in allowed
    ]
    if refused:
        raise CheckpointError(f"{origin} describes another kind of model than Mamba-1: {', '.join(refused)}.")
    return sizes


def original_config(config: LLMConfig) -> dict[str, Any]:
    """Return the `config.json` of the original layout (state-spaces/mamba)."""
    inner = {"d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand, "dt_rank": config.rank}
    return {
        "d_model": config.d_model,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": inner,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "norm_epsilon": config.norm_eps,
    }


def hugging_face_config(config: LLMConfig) -> dict[str, Any]:
    """Return the `config.json` of the Hugging Face layout (transformers' MambaForCausalLM)."""
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.padded_vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "time_step_rank": config.rank,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
