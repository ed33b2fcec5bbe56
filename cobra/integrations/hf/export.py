"""Cobra models as folders that transformers loads, with the code that it needs for that."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cobra.config import as_dict
from cobra.integrations.hf.card import model_card
from cobra.integrations.hf.chat import chat_template
from cobra.integrations.hf.configuration_cobra import CobraConfig
from cobra.integrations.hf.image_processing_cobra import CobraImageProcessor
from cobra.integrations.hf.modeling_cobra import CobraMambaForConditionalGeneration
from cobra.integrations.hf.processing_cobra import CobraProcessor
from cobra.models.hugging_face import their_name
from cobra.models.pretrained import hugging_face_config
from cobra.models.vlm import CobraVLM
from cobra.models.weights import self_contained, untied_state
from cobra.text.prompt import IMAGE_TAG, prompt_format
from cobra.text.tokenizer import END_OF_TEXT, Tokenizer

_AUTO_MODEL = "modeling_cobra.CobraMambaForConditionalGeneration"
MAX_NEW_TOKENS = 128  # where nothing is said, as `Cobra.generate`


def write_hugging_face(
    model: CobraVLM, tokenizer_file: Path, folder: Path, *, results: Path | None = None, shard_size: str = "5GB"
) -> None:
    """Write a model for `AutoModelForImageTextToText` and `AutoProcessor` of transformers.

    Args:
        model: its tensors are written in their stored dtypes.
        tokenizer_file: is copied.
        folder: exists, and is empty.
        results: a folder of evaluation results for the model card.
        shard_size: of a weight file at most.
    """
    processor = _processor(model, tokenizer_file)
    config = _config(model, processor)
    for exported, auto in (
        (CobraConfig, "AutoConfig"),
        (CobraMambaForConditionalGeneration, "AutoModelForImageTextToText"),
        (CobraImageProcessor, "AutoImageProcessor"),
        (CobraProcessor, "AutoProcessor"),
    ):
        exported.register_for_auto_class(auto)
    with torch.device("meta"):  # names and code alone; the tensors come from `model`
        theirs = CobraMambaForConditionalGeneration(config)
    theirs = theirs.to(dtype=model.llm.backbone.embedding.weight.dtype)  # type: ignore[arg-type]
    end_id = processor.tokenizer.eos_token_id
    theirs.generation_config.update(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, bos_token_id=end_id, eos_token_id=end_id, pad_token_id=end_id
    )
    state = {their_name(name): tensor.detach().cpu().contiguous() for name, tensor in untied_state(model).items()}
    theirs.save_pretrained(folder, state_dict=state, max_shard_size=shard_size)
    processor.save_pretrained(folder)
    # as it was: transformers would write `<image>` into it, which tokenizer_config.json names as well
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    (folder / "README.md").write_text(model_card(model.config, results), encoding="utf-8")


def _config(model: CobraVLM, processor: CobraProcessor) -> CobraConfig:
    config = self_contained(model.config)
    plain: Mapping[str, Any] = as_dict(config)
    vision = model.vision
    inputs = [
        {"view": view, "mean": list(tower.data["mean"]), "std": list(tower.data["std"])}  # type: ignore[union-attr,index]
        for tower, view in zip(vision.towers, vision.transform.view_of_tower, strict=True)
    ]
    text = {key: value for key, value in hugging_face_config(config.llm).items() if key != "architectures"}
    end_id = processor.tokenizer.eos_token_id
    result = CobraConfig(
        name=config.name,
        vision=plain["vision"],
        inputs=inputs,
        projector=plain["projector"],
        llm=plain["llm"],
        max_text_length=config.max_length,
        image_token_id=processor.image_token_id,
        text_config=text | {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id},
    )
    result.auto_map = {"AutoModel": _AUTO_MODEL}  # harnesses ask for it; transformers adds the others
    return result


def _processor(model: CobraVLM, tokenizer_file: Path) -> CobraProcessor:
    from transformers import PreTrainedTokenizerFast

    Tokenizer(tokenizer_file)  # its message where the file is none
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        extra_special_tokens=[IMAGE_TAG],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    transform = model.vision.transform
    views = [
        {"size": view.size, "interpolation": view.interpolation, "fill": list(view.fill)} for view in transform.views
    ]
    return CobraProcessor(
        CobraImageProcessor(resize=transform.strategy, views=views),
        tokenizer,
        chat_template=chat_template(prompt_format(model.config.llm.prompt)),
        num_image_tokens=model.num_image_tokens,
    )
