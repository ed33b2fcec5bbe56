"""From a name to a model: which of the known kinds of folder it stands for, and what its config resolves to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cobra.config import ModelConfig, as_config, as_dict, nearest, read_yaml
from cobra.errors import CheckpointError, ConfigError
from cobra.hub import resolve_file, resolve_model, resolve_model_folder
from cobra.models.public import is_public_run, load_public_run, public_config
from cobra.models.readers import read_json
from cobra.models.vlm import CobraVLM
from cobra.models.weights import load_model_folder, read_model_config
from cobra.releases import RELEASES, hub_name
from cobra.text.tokenizer import Tokenizer


def settings(given: Mapping[str, Any] | str | Path | None, argument: str) -> Mapping[str, Any] | None:
    """Return settings given as a mapping or as the path of a YAML file, whose own paths may be relative to it.

    Raises:
        ConfigError: the file is missing or holds no settings; the message names `argument`.
    """
    if given is None or isinstance(given, Mapping):
        return given
    file = Path(given).expanduser()
    return _anchored(read_yaml(file, argument), file.parent)


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
        CheckpointError: there is none.
    """
    try:
        return resolve_model(name)
    except CheckpointError as error:
        if str(name) not in RELEASES:
            raise CheckpointError(f"{error}{nearest(str(name), RELEASES)}") from None
    return resolve_model(hub_name(str(name)))


def is_mamba(folder: Path) -> bool:
    """Whether a folder holds a Mamba language model alone, in one of its public layouts."""
    file = folder / "config.json"
    return file.is_file() and bool({"d_model", "hidden_size"} & read_json(file).keys())


def read_model(
    name: str | Path,
    vision: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[CobraVLM, Tokenizer]:
    """Load a model and its tokenizer as `cobra.load` does; a dtype of None keeps the stored ones."""
    folder = find_model(name)
    if is_public_run(folder):
        config = public_config(folder, vision, llm)
        tokenizer = Tokenizer(resolve_file(config.llm.tokenizer, "llm.tokenizer"))  # before the weights: it is small
        _check_vocabulary(tokenizer, config)
        return load_public_run(folder, config, device=device, dtype=dtype), tokenizer
    folder = resolve_model_folder(folder)
    if is_mamba(folder):
        raise CheckpointError(
            f"{folder} holds a language model alone; give it as model.llm.weights of a training run. cobra.load reads "
            "whole vision-language models."
        )
    config = _changed(read_model_config(folder), vision, llm)
    tokenizer = Tokenizer(resolve_file(str(folder / "tokenizer.json"), "llm.tokenizer"))
    if llm and "tokenizer" in llm:
        tokenizer = Tokenizer(resolve_file(config.llm.tokenizer, "llm.tokenizer"))
    _check_vocabulary(tokenizer, config)
    return load_model_folder(folder, config=config, device=device, dtype=dtype), tokenizer


def _changed(config: ModelConfig, vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None) -> ModelConfig:
    """Return a model folder's config with settings replaced; its weights are in the folder, wherever these point."""
    if not vision and not llm:
        return config
    plain = as_dict(config)
    plain["vision"] |= dict(vision or {})
    plain["llm"] |= dict(llm or {})
    changed = as_config(ModelConfig, plain)
    towers = [replace(tower, weights="random") for tower in changed.vision.towers]
    return replace(changed, vision=replace(changed.vision, towers=towers), llm=replace(changed.llm, weights="random"))


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if len(tokenizer) > config.llm.padded_vocab_size:
        raise ConfigError(
            f"{tokenizer.file} has {len(tokenizer)} entries, but the language model only "
            f"{config.llm.padded_vocab_size}; give the tokenizer it was trained with as llm={{'tokenizer': ...}}."
        )
