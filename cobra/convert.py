"""Weights from one layout to another, without loss: nothing is cast, a model folder comes back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cobra.config import LLMConfig, as_config, one_of
from cobra.errors import CheckpointError, ConfigError, DataError
from cobra.hub import resolve_weights
from cobra.loading import find_model, is_mamba, read_model
from cobra.models.export import (
    check_replaceable,
    write_hugging_face_mamba,
    write_original_mamba,
    write_public_run,
)
from cobra.models.mamba import MambaLM
from cobra.models.pretrained import mamba_sizes, mamba_weights
from cobra.models.readers import read_json, read_weights
from cobra.models.vlm import CobraVLM
from cobra.models.weights import fill, parameters_on_meta, save_model_folder, whole_folder

LAYOUTS = {
    "cobra": "a model folder, which cobra.load reads",
    "public": "a run folder of the public Cobra release, with vision.yaml and llm.yaml for what its ids leave open",
    "hf": "the whole model, for transformers' AutoModelForImageTextToText, with the code that it needs",
    "hf-mamba": "the language model alone, for transformers' MambaForCausalLM",
    "mamba": "the language model alone, as state-spaces/mamba has it",
}


def convert(
    source: str,
    target: Path,
    to: str,
    *,
    vision: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    results: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model `source` in another layout, complete or not at all.

    Args:
        source: what `cobra.load` takes, or a Mamba in one of its two layouts (a folder or a Hub id).
        target: the folder to write.
        to: one of `LAYOUTS`.
        vision: as in `cobra.load`.
        llm: as in `cobra.load`.
        results: of to=hf: an evaluation's folder, or one around several of this model, for the model card.
        overwrite: replace a target that exists.

    Raises:
        CheckpointError: the target exists, the source is damaged, or holds less than the layout needs.
        ConfigError: the layout is not known, or a setting in `vision` or `llm`, or it has no effect; or transformers is
            needed and not installed.
        DataError: `results` holds none, or those of other models.
    """
    one_of("to", to, LAYOUTS)
    if results is not None and to != "hf":
        raise ConfigError(f"results go into the model card of to=hf; they have no effect on to={to}. Leave them out.")
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} exists; choose another target, or replace it with --overwrite (overwrite=True)."
        )
    check_replaceable(target, Path(source))
    if results is not None:
        _check_results(results, source, vision, llm)
    model, tokenizer_file = _read(source, vision, llm)
    if to == "cobra" and isinstance(model, CobraVLM) and tokenizer_file is not None:
        save_model_folder(model, tokenizer_file, target)
        return
    with whole_folder(target) as folder:
        if to in ("hf-mamba", "mamba"):
            language_model = model.llm if isinstance(model, CobraVLM) else model
            write = write_hugging_face_mamba if to == "hf-mamba" else write_original_mamba
            write(language_model, tokenizer_file, folder)
        elif isinstance(model, CobraVLM) and tokenizer_file is not None:
            if to == "hf":
                from cobra.integrations.hf.export import write_hugging_face

                write_hugging_face(model, tokenizer_file, folder, results=results)
            else:
                write_public_run(model, tokenizer_file, folder)
        else:
            raise CheckpointError(
                f"{source} holds a language model alone, and to={to} needs a vision-language model; choose to=hf-mamba "
                "or to=mamba, or train a model from it with model.llm.weights."
            )


def _check_results(results: Path, source: str, vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None) -> None:
    """Refuse evaluations of other weights than the source's; those that came without a fingerprint are believed."""
    from cobra.eval.fingerprint import model_fingerprint

    own = model_fingerprint(source, vision=vision, llm=llm)["model"]
    for file in sorted(results.rglob("fingerprint.json")):
        if read_json(file).get("model") != own:
            raise DataError(
                f"{file.parent} holds results of other weights than those of {source}; give the results of this model, "
                "or convert the one that was evaluated."
            )


def _read(
    source: str, vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None
) -> tuple[CobraVLM | MambaLM, Path | None]:
    """Return the model in its stored dtypes, and its tokenizer file where there is one."""
    folder = find_model(source)
    if not is_mamba(folder):
        model, tokenizer = read_model(folder, vision, llm)
        return model, tokenizer.file
    if vision or llm:
        raise ConfigError(
            f"{source} is a language model alone, which its own config.json describes; vision and llm have no effect. "
            "Leave them out."
        )
    sizes = mamba_sizes(read_json(folder / "config.json"), str(folder / "config.json"))
    config = as_config(LLMConfig, {"tokenizer": "tokenizer.json", "prompt": "mamba"} | sizes)
    with parameters_on_meta():
        model = MambaLM(config)
    # of a Hub repository only config.json and tokenizer.json are here so far: weights have names of many kinds
    fill(model, mamba_weights(read_weights(resolve_weights(source, "source"))))
    tokenizer_file = folder / "tokenizer.json"
    return model, tokenizer_file if tokenizer_file.is_file() else None
