"""The pretrain journey: a typed config -> a run folder with a trained model in it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
import yaml

from cobra.config import PretrainConfig, as_dict, flatten
from cobra.data import easyvqa
from cobra.data.conversations import ConversationDataset, Transform, digest, read_rows
from cobra.data.loader import iterate
from cobra.data.sampler import UnitSampler
from cobra.errors import CheckpointError, DataError
from cobra.hub import resolve_file, resolve_model, resolve_model_folder
from cobra.models.build import build_model, set_trainable
from cobra.models.public import is_public_run, load_public_run
from cobra.models.vlm import CobraVLM, check_vocabulary
from cobra.models.weights import load_model_folder, save_model_folder
from cobra.ops import use_backend
from cobra.runtime import pick_device, write_text
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer
from cobra.train import checkpoint
from cobra.train.optim import build_optimizer
from cobra.train.plots import plot_loss
from cobra.train.trackers import build_trackers
from cobra.train.trainer import Trainer

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"

# Settings that may differ when a run is resumed. They change no weight; the data's rows are compared themselves.
FREE_SETTINGS = (
    "paths.",
    "tracker.",
    "resume",
    "data.annotations",
    "data.images",
    "data.check",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.num_workers",
)


def pretrain(config: PretrainConfig) -> Path:
    """Train as configured, from scratch or from where the run folder stopped; return the run folder.

    Everything that can be checked is checked before the first step: the run folder, the weights, the data.

    Raises:
        CobraError: one of its children says what does not fit.
    """
    with use_backend(config.parallel.ops):
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> Path:
    run_folder = Path(config.paths.runs) / config.run.name
    _check_run_folder(run_folder, config)
    device = pick_device(config.parallel.device)
    tokenizer = Tokenizer(resolve_file(config.model.llm.tokenizer, "model.llm.tokenizer"))
    model = _initial_model(config, tokenizer)
    dataset = _dataset(config, tokenizer, model.vision.transform)
    sampler = UnitSampler(
        [row.image for row in dataset.rows],
        batch_size=config.train.global_batch_size,
        rows_per_image=config.data.rows_per_image,
        seed=config.run.seed,
    )
    num_steps = config.train.max_steps or math.ceil((config.train.epochs or 0) * sampler.batches_per_epoch)

    model.to(device)
    optimizer = build_optimizer(model.named_parameters(), config.train)
    trainer = Trainer(config, model, optimizer, run_folder, num_steps, data_digest=digest(dataset.rows))
    torch.manual_seed(config.run.seed)  # what layers draw (drop path); a checkpoint puts back its own state
    trainer.resume()
    if trainer.progress.step < num_steps:
        _fit(trainer, dataset, sampler)
        save_model_folder(model, tokenizer.file, run_folder / "model")
    else:
        log.info("Run %s has already finished its %d steps.", run_folder, num_steps)
        if not (run_folder / "model").exists():  # killed between the last checkpoint and the export
            save_model_folder(model, tokenizer.file, run_folder / "model")
    log.info("Model: %s | loss curve: %s", run_folder / "model", run_folder / "loss.png")
    return run_folder


def _fit(trainer: Trainer, dataset: ConversationDataset, sampler: UnitSampler) -> None:
    """Train from where the trainer stands; metrics and loss.png are written also when it is interrupted."""
    config, run_folder, first_step = trainer.config, trainer.run_folder, trainer.progress.step
    learnt = sum(parameter.numel() for parameter in trainer.parameters)
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    epochs = trainer.num_steps / sampler.batches_per_epoch
    log.info("Run %s on %s: %s of %s parameters learn.", run_folder, trainer.model.device, f"{learnt:,}", f"{total:,}")
    log.info(
        "Data %s: %s rows; %d steps are %.2f epochs.",
        config.data.name,
        f"{len(dataset.rows):,}",
        trainer.num_steps,
        epochs,
    )
    write_text(run_folder / CONFIG_FILE, yaml.safe_dump(as_dict(config), sort_keys=False))
    steps = iterate(
        dataset,
        sampler,
        micro_batch_size=config.train.per_device_batch_size,
        first_step=first_step,
        num_steps=trainer.num_steps,
        num_workers=config.train.num_workers,
    )
    trackers = build_trackers(config.tracker, run_folder, as_dict(config), first_step)
    try:
        trainer.fit(steps, trackers)
    finally:
        for tracker in trackers:
            tracker.close()
        plot_loss(run_folder)


def _initial_model(config: PretrainConfig, tokenizer: Tokenizer) -> CobraVLM:
    """Build the model as step 0 sees it, with the stage's parts set to learn."""
    check_vocabulary(tokenizer, config.model.llm, f"Set model.llm.vocab_size={len(tokenizer)}.")
    start = None if config.init_from is None else _start_folder(config.init_from)  # before weights are read
    if start is None:
        model = build_model(config.model, config.run.seed)
    elif is_public_run(start):
        model = load_public_run(start, config.model, dtype=torch.float32)  # parts it does not hold: as the config says
    else:
        model = load_model_folder(start, config=config.model, dtype=torch.float32)
    set_trainable(model, config.train.stage)
    return model


def _start_folder(name: str) -> Path:
    """Return the folder that `init_from` names: a run in the public layout, or a model of ours."""
    folder = resolve_model(name)
    return folder if is_public_run(folder) else resolve_model_folder(folder)


def _dataset(config: PretrainConfig, tokenizer: Tokenizer, transform: Transform) -> ConversationDataset:
    """Read the data, making it first where that can be done, and check it."""
    annotations = Path(config.data.annotations)
    if config.data.source == "easyvqa" and annotations.name == "train.json" and not annotations.exists():
        easyvqa.prepare(annotations.parent)
    dataset = ConversationDataset(
        read_rows(annotations),
        Path(config.data.images),
        tokenizer,
        prompt_format(config.model.llm.prompt),
        transform,
        max_length=config.model.max_length,
        captions_only=config.train.stage == "align",
    )
    text_row = next((row.id for row in dataset.rows if row.image is None), None)
    if config.train.stage == "align" and text_row is not None:
        raise DataError(
            f"{annotations}: row {text_row!r} has no image, and train.stage=align learns from images alone; "
            "leave out the rows without image, or choose another stage."
        )
    dataset.check_images(decode=config.data.check == "decode")
    if config.data.check == "decode":
        dataset.check_labels()
    return dataset


def _check_run_folder(run_folder: Path, config: PretrainConfig) -> None:
    """Refuse a run folder in which another config has been trained."""
    file, remedy = run_folder / CONFIG_FILE, "Choose another run.name, or delete the folder to start anew."
    has_checkpoint = checkpoint.latest(run_folder / "checkpoints") is not None
    if not has_checkpoint and not (run_folder / "model").exists():
        return  # nothing was trained here yet
    if config.resume == "never":
        raise CheckpointError(f"{run_folder} holds a trained run and resume=never. {remedy}")
    if not has_checkpoint:
        raise CheckpointError(f"{run_folder} holds a finished model but no checkpoint to go on from. {remedy}")
    if not file.exists():
        raise CheckpointError(f"{run_folder} holds checkpoints but no {CONFIG_FILE} that says of what. {remedy}")
    try:
        found: dict[str, Any] = flatten(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, AttributeError):
        raise CheckpointError(f"{file} is not a config. {remedy}") from None
    wanted = flatten(as_dict(config))
    different = [
        f"{key}: {found.get(key)} there, {wanted.get(key)} asked for"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key) and not key.startswith(FREE_SETTINGS)
    ]
    if different:
        raise CheckpointError(f"{run_folder} belongs to a run with other settings ({'; '.join(different)}). {remedy}")
