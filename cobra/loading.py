"""From a name to a model: which of the known kinds of folder it stands for, and what its config resolves to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cobra.config import LLMConfig, LoraConfig, ModelConfig, VisionConfig, as_config, as_dict, nearest, read_yaml
from cobra.errors import CheckpointError, ConfigError
from cobra.hub import local_model, resolve_file, resolve_model, resolve_model_folder
from cobra.models.hugging_face import is_hugging_face, load_hugging_face
from cobra.models.lora import merged_state
from cobra.models.pretrained import unwrapped
from cobra.models.public import CHECKPOINT, is_public_run, load_public_run, public_config
from cobra.models.readers import Weights, read_json, read_weights
from cobra.models.sharded import is_sharded, read_sharded
from cobra.models.vlm import CobraVLM, check_vocabulary
from cobra.models.weights import fill, load_model_folder, parameters_on_meta, read_model_config, self_contained
from cobra.releases import RELEASES, hub_name
from cobra.text.tokenizer import Tokenizer

_EXAMPLES = {"vision": "{'towers': [{'timm': ..., 'image_size': ...}]}", "llm": "{'tokenizer': ...}"}
_OTHER_TOKENIZER = "Give the tokenizer that the model was trained with as llm={'tokenizer': ...}."

_VISION: dict[str, Any] = {"towers": [{"timm": "any", "image_size": 1}]}
_LLM: dict[str, Any] = {"d_model": 1, "num_layers": 1, "vocab_size": 1, "tokenizer": "any", "prompt": "mamba"}


@dataclass(frozen=True, kw_only=True)
class _Overrides:
    """What `vision=` and `llm=` may hold; the two defaults above stand for what is not given."""

    vision: VisionConfig
    llm: LLMConfig


def settings(given: Mapping[str, Any] | str | Path | None, argument: str) -> Mapping[str, Any] | None:
    """Return settings given as a mapping or as the path of a YAML file, whose own paths may be relative to it.

    Raises:
        ConfigError: it is neither, or the file is missing or holds no settings; the message names `argument`.
    """
    if given is None or isinstance(given, Mapping):
        return given
    if not isinstance(given, (str, Path)):
        raise ConfigError(
            f"{argument}={given!r} is of type {type(given).__name__}, and must be settings by name, such as "
            f"{argument}={_EXAMPLES[argument]}, or a YAML file of them."
        )
    try:
        file = Path(given).expanduser()
        return _anchored(read_yaml(file, argument), file.parent)
    except (ValueError, RuntimeError) as error:  # a NUL byte; a home that nobody has
        raise ConfigError(f"{argument}={str(given)!r} is not the path of a YAML file: {error}.") from None


def _anchored(node: Any, folder: Path) -> Any:
    """Return settings in which files that lie in `folder` are named by their full paths."""
    if isinstance(node, Mapping):
        return {
            key: str(folder / value)
            if key in ("weights", "tokenizer") and isinstance(value, str) and (folder / value).exists()
            else _anchored(value, folder)
            for key, value in node.items()
        }
    return [_anchored(item, folder) for item in node] if isinstance(node, list) else node


def find_model(name: str | Path) -> Path:
    """Return the folder that `cobra.load` reads for `name`, fetched from the Hub where it has to be.

    Raises:
        ConfigError: this is no name.
        CheckpointError: there is none.
    """
    if str(name) in RELEASES:
        return local_model(name) or resolve_model(hub_name(str(name)))
    try:
        return resolve_model(name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{nearest(str(name), RELEASES)}") from None


def is_mamba(folder: Path) -> bool:
    """Whether a folder holds a Mamba language model alone, in one of its public layouts."""
    file = folder / "config.json"
    return file.is_file() and bool({"d_model", "hidden_size"} & read_json(file).keys())


def check_overrides(vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None) -> None:
    """Raise ConfigError, naming the key, unless `vision` and `llm` are settings of VisionConfig and LLMConfig."""
    for argument, given in (("vision", vision), ("llm", llm)):
        if any(not isinstance(key, str) for key in given or {}):
            raise ConfigError(f"{argument} must hold settings by name, such as {_EXAMPLES[argument]}.")
    try:
        as_config(_Overrides, {"vision": _VISION | dict(vision or {}), "llm": _LLM | dict(llm or {})})
    except ConfigError as error:  # a schema's own checks name a setting as training does
        raise ConfigError(str(error).replace("model.vision", "vision").replace("model.llm", "llm")) from None


def read_model(
    name: str | Path,
    vision: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[CobraVLM, Tokenizer]:
    """Load a model and its tokenizer as `cobra.load` does; a dtype of None keeps the stored ones.

    Raises:
        CheckpointError: there is no such model, or it is damaged, or no whole vision-language model.
        ConfigError: `vision` or `llm` holds what is no setting, or has no effect, or does not fit the weights.
    """
    check_overrides(vision, llm)
    folder = find_model(name)
    if is_mamba(folder):
        raise CheckpointError(
            f"{folder} holds no Cobra model but a language model alone. cobra.load reads whole vision-language models; "
            "a Mamba may be given as model.llm.weights of a training run."
        )
    if is_public_run(folder):
        return _read_public(folder, vision, llm, device, dtype)
    if is_sharded(folder):
        if vision or llm:
            raise ConfigError(
                f"{folder} is a training checkpoint, on which vision and llm have no effect. Leave them out."
            )
        return _read_checkpoint(folder, device, dtype)
    if is_hugging_face(folder):
        if vision or llm:
            raise ConfigError(f"{folder} describes itself; vision and llm have no effect on it. Leave them out.")
        tokenizer = Tokenizer(resolve_file(str(folder), "llm.tokenizer"))
        model = load_hugging_face(folder, device=device, dtype=dtype)
        check_vocabulary(tokenizer, model.config.llm, "Export the model again.")
        return model, tokenizer
    folder = resolve_model_folder(folder)
    config = _changed(folder, vision, llm)
    tokenizer = Tokenizer(resolve_file(str(folder / "tokenizer.json"), "llm.tokenizer"))
    if llm and "tokenizer" in llm:
        tokenizer = Tokenizer(resolve_file(config.llm.tokenizer, "llm.tokenizer"))
    check_vocabulary(tokenizer, config.llm, _OTHER_TOKENIZER)
    return load_model_folder(folder, config=config, device=device, dtype=dtype), tokenizer


def _read_checkpoint(
    folder: Path, device: torch.device | None, dtype: torch.dtype | None
) -> tuple[CobraVLM, Tokenizer]:
    """Load a run's training checkpoint, adapters merged; the run's own config says what it is."""
    file = folder.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{folder} is a training checkpoint, but its run's config {file} is missing.")
    run = read_yaml(file, "config")
    try:
        config, lora = as_config(ModelConfig, run["model"]), run["train"]["lora"]
        adapters = None if lora is None else as_config(LoraConfig, lora)
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{file} does not describe a run: {error}") from None
    tokenizer = Tokenizer(resolve_file(config.llm.tokenizer, "model.llm.tokenizer"))
    tensors = read_sharded(folder)
    if adapters is not None:
        tensors = merged_state(tensors, adapters)
    with parameters_on_meta():
        model = CobraVLM(self_contained(config))
    fill(model, Weights.of(tensors, str(folder)), device=device, dtype=dtype)
    return model.to(device), tokenizer


def _read_public(
    folder: Path,
    vision: Mapping[str, Any] | None,
    llm: Mapping[str, Any] | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> tuple[CobraVLM, Tokenizer]:
    """Load a run in the public layout: it holds the parts that were trained, and the config names the others."""
    config = public_config(folder, vision, llm)
    if vision or llm:
        held = {name.split(".")[0] for name in unwrapped(read_weights(folder / CHECKPOINT))}
        useless = [key for key in _weights_in(vision, llm) if f"{key.split('.')[0]}_backbone" in held]
        if useless:
            raise ConfigError(_no_effect(useless, folder / CHECKPOINT))
        random = [f"vision.towers[{i}]" for i, tower in enumerate(config.vision.towers) if tower.weights == "random"]
        if config.llm.weights == "random" and "llm_backbone" not in held:
            raise ConfigError(
                f"{folder / CHECKPOINT} holds no language model, as after the stage align. Say where its weights are, "
                "as llm.weights: a file, a folder or a Hub id."
            )
        if random and "vision_backbone" not in held:
            raise ConfigError(
                f"{random[0]}.weights='random' would make a blind model, as {folder / CHECKPOINT} holds no vision "
                "weights. Name a file, or 'timm' for the published ones."
            )
    tokenizer = Tokenizer(resolve_file(config.llm.tokenizer, "llm.tokenizer"))  # before the weights: it is small
    check_vocabulary(tokenizer, config.llm, _OTHER_TOKENIZER)
    return load_public_run(folder, config, device=device, dtype=dtype), tokenizer


def _weights_in(vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None) -> list[str]:
    """Return the keys of settings that name weights; "random" names none."""
    towers = enumerate((vision or {}).get("towers", []))
    found = [f"vision.towers[{i}].weights" for i, tower in towers if tower.get("weights", "random") != "random"]
    return [*found, "llm.weights"] if (llm or {}).get("weights", "random") != "random" else found


def _no_effect(keys: list[str], file: Path) -> str:
    return f"{', '.join(keys)}: no effect, as {file} holds these weights itself. Leave them out."


def _changed(folder: Path, vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None) -> ModelConfig:
    """Return a model folder's config with settings replaced; its weights are in the folder, and there alone."""
    config = read_model_config(folder)
    if not vision and not llm:
        return config
    useless = _weights_in(vision, llm)
    if useless:
        raise ConfigError(_no_effect(useless, folder / "model.safetensors"))
    plain = as_dict(config)
    plain["vision"] |= dict(vision or {})
    plain["llm"] |= dict(llm or {})
    changed = as_config(ModelConfig, plain)
    towers = [replace(tower, weights="random") for tower in changed.vision.towers]
    return replace(changed, vision=replace(changed.vision, towers=towers))
