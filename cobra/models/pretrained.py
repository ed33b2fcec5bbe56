"""Pretrained parts from wherever a user has them: timm's encoders, and Mamba in its two public layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import get_pretrained_cfg

from cobra.config import LLMConfig, TowerConfig
from cobra.errors import CheckpointError, ConfigError
from cobra.hub import resolve_weights
from cobra.models.mamba import MambaLM
from cobra.models.readers import Weights, read_weights
from cobra.models.vision import VisionTower
from cobra.models.weights import STORED_DTYPES, TIED, fill, is_finite, not_finite

EMBEDDING = "backbone.embedding.weight"

# Training files wrap the weights: {"state_dict": ..., "epoch": ...}. Averaged ones first, as timm does.
_WRAPPERS = ("state_dict_ema.", "model_ema.", "state_dict.", "model.")
# What may stand beside the weights in a training file, and is of no use here.
_TRAINING_STATE = (
    "optimizer", "optimizers", "optimizer_states", "lr_scheduler", "lr_schedulers", "scheduler", "scaler", "amp_scaler",
    "callbacks", "loops", "rng", "rng_state", "epoch", "step", "iteration",
)  # fmt: skip
# What timm's models have behind their last block: final norm, pooling, classifier. Features are taken before it and a
# tower is built without a classifier, so a file may hold it in vain. By full names, so that nothing else hides there.
_BEHIND_THE_BLOCKS = re.compile(
    r"(norm|fc_norm|head|head_dist)\.(weight|bias)"
    r"|attn_pool\.(latent|pos_embed|(q|k|v|kv|proj|norm|q_norm|k_norm|mlp\.\w+)\.(weight|bias))"
)


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
    weights = tower_weights(tower, unwrapped(read_weights(resolve_weights(name, setting))), config.timm)
    fill(tower.model, weights, device=device, dtype=dtype)


def tower_weights(tower: VisionTower, weights: Weights, name: str) -> Weights:
    """Return a timm checkpoint's weights as the tower's model wants them, without what lies behind its last block.

    Raises:
        CheckpointError: timm cannot adapt them to its model `name`.
    """
    try:
        tensors = tower.adapt_weights(weights)
    except (RuntimeError, KeyError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise CheckpointError(
            f"{weights.origin} does not fit {name}: {error}. Name the model that it was written by as "
            "model.vision.towers[].timm, or weights of this one."
        ) from None
    wanted = tower.model.state_dict()
    kept = {key: value for key, value in tensors.items() if key in wanted or not _BEHIND_THE_BLOCKS.fullmatch(key)}
    return Weights.of(kept, weights.origin, weights.source(""))


def weights_name(config: TowerConfig) -> str:
    """Return the file, folder or Hub id that an encoder's weights come from.

    Raises:
        ConfigError: timm publishes none.
    """
    if config.weights != "timm":
        return config.weights
    known = get_pretrained_cfg(config.timm)
    return _published({} if known is None else known.to_dict(), config.timm)


def _published(pretrained_cfg: Mapping[str, Any], name: str) -> str:
    hub_id = pretrained_cfg.get("hf_hub_id")
    if not hub_id:
        raise ConfigError(
            f"timm publishes no weights for {name!r}; name a tag, such as 'vit_...dinov2.lvd142m', or a local file as "
            "model.vision.towers[].weights."
        )
    return hub_id


def unwrapped(weights: Weights) -> Weights:
    """Return the weights inside a training file's wrapping, without prefixes of data-parallel or compiled modules.

    What lies beside the wrapped weights keeps its name, and so fits no model, unless it is known training state.
    """
    prefix = next((wrapper for wrapper in _WRAPPERS if any(name.startswith(wrapper) for name in weights)), "")
    ignored = {wrapper.removesuffix(".") for wrapper in _WRAPPERS} | {*_TRAINING_STATE} if prefix else set[str]()
    inside = [name for name in weights if name.startswith(prefix)]
    for added in ("_orig_mod.", "module.", "_orig_mod."):
        if inside and all(name.startswith(prefix + added) for name in inside):
            prefix += added

    def rename(name: str) -> str | None:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
        return None if name.split(".")[0] in ignored else name

    return weights.renamed(rename, prefix)


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
        others = ("vision.", "projector.")
        weights = weights.renamed(lambda name: None if name.startswith(others) else name.removeprefix("llm."), "llm.")
    weights = weights.renamed(lambda name: name.replace("backbone.embeddings.", "backbone.embedding.", 1))
    if TIED in weights and EMBEDDING not in weights:
        weights = weights.renamed(lambda name: EMBEDDING if name == TIED else name)
    if TIED in weights and is_finite(weights[EMBEDDING]):  # else that is what `fill` says, with all other such names
        _check_tied(weights)
    return weights.renamed(lambda name: None if name == TIED else name)


def _check_tied(weights: Weights) -> None:
    """Raise CheckpointError unless the head is the embedding, which may be stored with more bits, or with fewer."""
    head, embedding = weights[TIED], weights[EMBEDDING]
    if not is_finite(head):
        raise not_finite(weights.origin, [weights.source(TIED)])
    if head.shape == embedding.shape and {head.dtype, embedding.dtype} <= {*STORED_DTYPES}:
        fewer = min(head.dtype, embedding.dtype, key=lambda dtype: dtype.itemsize)
        rows = zip(head.split(4096), embedding.split(4096), strict=True)  # a cast tensor is memory; few rows are little
        if all(torch.equal(one.to(fewer), other.to(fewer)) for one, other in rows):
            return
    described = [
        f"{weights.source(name)} {list(weights.shapes[name])} {weights.dtypes[name]}".replace("torch.", "")
        for name in (TIED, EMBEDDING)
    ]
    raise CheckpointError(
        f"{weights.origin}: {described[0]} is not equal to {described[1]}; Mamba's output head is tied to its "
        "embedding here, so this model cannot be read without changing it. Use a model whose head is tied."
    )


def mamba_sizes(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the LLMConfig settings that a Mamba's own `config.json`, of either layout, stands for.

    Raises:
        CheckpointError: it describes no Mamba-1, or one with parts that ours does not have.
    """
    inner = config.get("ssm_cfg") or {}
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{origin}: ssm_cfg={inner!r} must be an object of sizes, or left out.")
    is_original = "d_model" in config
    keys = {
        "d_model": "d_model" if is_original else "hidden_size",
        "num_layers": "n_layer" if is_original else "num_hidden_layers",
        "vocab_size": "vocab_size",
    }
    missing = [key for key in keys.values() if key not in config]
    if missing:
        raise CheckpointError(f"{origin} does not describe a Mamba: it lacks {', '.join(missing)}.")
    optional = (
        {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "dt_rank": "dt_rank"}
        if is_original
        else {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
    )
    source = inner if is_original else config
    given = {theirs: config[theirs] for theirs in keys.values()}
    given |= {key: source[key] for key in optional.values() if source.get(key) not in (None, "auto")}
    sizes: dict[str, Any] = {ours: given[theirs] for ours, theirs in (keys | optional).items() if theirs in given}
    for key in ("norm_epsilon", "layer_norm_epsilon"):
        if key in config:
            sizes["norm_eps"] = given[key] = config[key]
    # In the Hugging Face layout the vocabulary is what the embedding has rows, padding included.
    sizes["pad_vocab_multiple"] = 1
    if is_original:
        sizes["pad_vocab_multiple"] = given["pad_vocab_size_multiple"] = config.get("pad_vocab_size_multiple", 8)
    wrong = [
        f"{key}={value!r}"
        for key, value in given.items()
        if isinstance(value, bool)
        or not isinstance(value, (int, float) if key.endswith("epsilon") else int)
        or not 0 < value < float("inf")
    ]
    if wrong:
        raise CheckpointError(
            f"{origin}: {', '.join(wrong)} must be numbers above 0, and whole ones but for the epsilon; fetch the file "
            "again, or correct them."
        )
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
