"""Models written in the layouts of others: the public Cobra release, and Mamba's two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from cobra.config import ModelConfig, as_dict
from cobra.errors import CheckpointError
from cobra.models.mamba import MambaLM
from cobra.models.pretrained import EMBEDDING, hugging_face_config, original_config
from cobra.models.public import CHECKPOINT, public_ids
from cobra.models.vlm import CobraVLM
from cobra.models.weights import TIED, untied_state

# What stands in a folder of any layout that is written here; a folder that holds nothing else may be replaced.
_OWN_FILES = (
    "model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "README.md", "checkpoints", "vision",
    "vision.yaml", "llm.yaml",
    # transformers' own
    "generation_config.json", "model-*.safetensors", "model.safetensors.index.json", "tokenizer_config.json",
    "processor_config.json", "chat_template.jinja", "configuration_cobra.py", "modeling_cobra.py",
    "processing_cobra.py", "image_processing_cobra.py",
)  # fmt: skip


def check_replaceable(folder: Path, source: Path | None = None) -> None:
    """Make sure that a model may be written to `folder`, in place of whatever is there.

    Raises:
        CheckpointError: it cannot be made; or it is there and holds something else than a model, or `source`, or the
            current folder.
    """
    try:
        place = folder.resolve()
        around = next(path for path in (place, *place.parents) if path.exists())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte; too long
        raise CheckpointError(f"{str(folder)[:200]!r} is not a folder that can be written: {error}.") from None
    if Path.cwd().is_relative_to(place):
        raise CheckpointError(f"{folder} is the current folder or around it; name a new folder for the model.")
    if around != place and not around.is_dir():
        raise CheckpointError(f"{folder} cannot be made, because {around} is a file; choose another place.")
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is not a folder; choose another place, or remove it.")
    if source is not None and source.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder} holds the source {source}; choose another place.")
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not any(fnmatchcase(name, own) for own in _OWN_FILES)]
    if others:
        named = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        raise CheckpointError(
            f"{folder} exists and holds more than a model ({named}); choose another place, or remove it."
        )


def write_public_run(model: CobraVLM, tokenizer_file: Path, folder: Path) -> None:
    """Write the public Cobra layout, and beside it what that layout leaves to ids.

    The extra files are the encoders' weights and the tokenizer, with `vision.yaml` and `llm.yaml` that describe them:
    `cobra.load(folder, vision=f"{folder}/vision.yaml", llm=f"{folder}/llm.yaml")`.
    """
    config = model.config
    (folder / CHECKPOINT.parent).mkdir(parents=True)
    llm = _tensors(model.llm)
    llm[TIED] = llm[EMBEDDING]
    parts = {
        "projector": _tensors(model.projector),
        "llm_backbone": {f"llm.{name}": tensor for name, tensor in llm.items()},
    }
    torch.save({"model": parts}, folder / CHECKPOINT)
    _write_json(folder / "config.json", {"model": public_ids(config), "run_id": config.name, "stage": "finetune"})
    vision, settings = (
        as_dict(config.vision),
        as_dict(config.llm) | {"weights": "random", "tokenizer": "tokenizer.json"},
    )
    (folder / "vision").mkdir()
    for i, tower in enumerate(model.vision.towers):
        file = f"vision/tower-{i}.safetensors"
        save_file(_tensors(tower.model), folder / file)  # type: ignore[arg-type]
        vision["towers"][i]["weights"] = file
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    for name, content in (("vision", vision), ("llm", settings)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def write_hugging_face_mamba(llm: MambaLM, tokenizer_file: Path | None, folder: Path) -> None:
    """Write a language model for transformers' `MambaForCausalLM.from_pretrained`."""
    tensors = {
        name.replace("backbone.embedding.", "backbone.embeddings.", 1): tensor for name, tensor in _tensors(llm).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(llm.backbone.embedding.weight.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", hugging_face_config(llm.config) | {"dtype": dtype})
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")


def write_original_mamba(llm: MambaLM, tokenizer_file: Path | None, folder: Path) -> None:
    """Write a language model in the layout of state-spaces/mamba."""
    tensors = _tensors(llm)
    torch.save(tensors | {TIED: tensors[EMBEDDING]}, folder / "pytorch_model.bin")
    _write_json(folder / "config.json", original_config(llm.config))
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")


def model_card(config: ModelConfig, repository: str) -> str:
    """Return the README of a model on the Hub."""
    return (
        f"---\npipeline_tag: image-text-to-text\ntags: [cobra, mamba, vision-language]\n---\n# {config.name}\n\n"
        "A Mamba vision-language model made with Cobra (arXiv 2403.14520).\n\n"
        f"{parts_table(config)}\n"
        f'```python\nimport cobra\n\nvlm = cobra.load("{repository}")\n'
        'vlm.generate("photo.png", "What is this?")\n```\n'
    )


def parts_table(config: ModelConfig) -> str:
    """Return a model's parts as a table of Markdown."""
    towers = ", ".join(f"{tower.timm} at {tower.image_size} px" for tower in config.vision.towers)
    prompt = config.llm.prompt.replace("\n", "<br>")
    return (
        f"| part | |\n|---|---|\n| vision | {towers}; {config.vision.resize} |\n"
        f"| projector | {config.projector.kind} |\n"
        f"| language model | Mamba, width {config.llm.d_model}, {config.llm.num_layers} layers |\n"
        f"| prompt format | {prompt} |\n"
    )


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in untied_state(module).items()}


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
