"""The pretrain journey: a typed config -> a run folder with a trained model in it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import yaml

from cobra.config import DataConfig, PretrainConfig, as_dict, flatten
from cobra.data import easyvqa
from cobra.data.conversations import ConversationDataset, read_rows
from cobra.data.loader import iterate
from cobra.data.sampler import UnitSampler
from cobra.errors import CheckpointError, ConfigError
from cobra.hub import resolve_file, resolve_model_folder
from cobra.models.build import build_model, set_trainable
from cobra.models.weights import load_part, save_model_folder
from cobra.runtime import pick_device, write_text
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer
from cobra.train.optim import build_optimizer
from cobra.train.plots import plot_loss
from cobra.train.trackers import build_trackers
from cobra.train.trainer import Trainer

log = logging.getLogger(__name__)

# Settings that may differ when a run is resumed: they change no weight.
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

    Everything that can be checked is checked before the first step: the run folder's config, the data, the weights.

    Raises:
        CobraError: one of its children says what does not fit.
    """
    run_folder = Path(config.paths.runs) / config.run.name
    _claim(run_folder, config)
    device = pick_device(config.parallel.device)
    tokenizer = Tokenizer(resolve_file(config.model.llm.tokenizer, "model.llm.tokenizer"))
    if len(tokenizer) > config.model.llm.padded_vocab_size:
        raise ConfigError(
            f"model.llm.vocab_size={config.model.llm.vocab_size} is less than the tokenizer's {len(tokenizer)} entries."
        )
    model = build_model(config.model, config.run.seed)
    if config.init_from is not None:
        load_part(model, resolve_model_folder(config.init_from) / "model.safetensors")
    set_trainable(model, config.train.stage)

    prepare_data(config.data)
    dataset = ConversationDataset(
        read_rows(Path(config.data.annotations)),
        Path(config.data.images),
        tokenizer,
        prompt_format(config.model.llm.prompt),
        model.vision.transform,
        max_length=config.model.max_length,
        captions_only=config.train.stage == "align",
    )
    dataset.check_images(decode=config.data.check == "decode")
    sampler = UnitSampler(
        [row.image for row in dataset.rows],
        batch_size=config.train.global_batch_size,
        rows_per_image=config.data.rows_per_image,
        seed=config.run.seed,
    )
    num_steps = config.train.max_steps or math.ceil((config.train.epochs or 0) * sampler.batches_per_epoch)

    model.to(device)
    optimizer = build_optimizer(model.named_parameters(), config.train)
    trainer = Trainer(config, model, optimizer, run_folder, num_steps)
    trainer.resume()
    if trainer.progress.step < num_steps:
        trained = sum(parameter.numel() for parameter in trainer.parameters)
        total = sum(parameter.numel() for parameter in model.parameters())
        log.info(
            "Run %s: %s of %s parameters learn, %s rows, %d steps (%.2f epochs) on %s.",
            run_folder,
            f"{trained:,}",
            f"{total:,}",
            f"{len(dataset.rows):,}",
            num_steps,
            num_steps / sampler.batches_per_epoch,
            device,
        )
        trackers = build_trackers(config.tracker, run_folder, as_dict(config), trainer.progress.step)
        steps = iterate(
            dataset,
            sampler,
            micro_batch_size=config.train.per_device_batch_size,
            first_step=trainer.progress.step,
            num_steps=num_steps,
            num_workers=config.train.num_workers,
        )
        try:
            trainer.fit(steps, trackers)
        finally:
            for tracker in trackers:
                tracker.close()
            plot_loss(run_folder)
    else:
        log.info("Run %s has already finished its %d steps.", run_folder, num_steps)
    save_model_folder(model, tokenizer.file, run_folder / "model")
    log.info("Model: %s | loss curve: %s", run_folder / "model", run_folder / "loss.png")
    return run_folder


def prepare_data(config: DataConfig) -> None:
    """Make a data set that can be made here, unless it is there already."""
    if config.source == "easyvqa" and not Path(config.annotations).exists():
        easyvqa.prepare(Path(config.annotations).parent)


def _claim(run_folder: Path, config: PretrainConfig) -> None:
    """Make the run folder with its config.yaml, or check that an existing one belongs to the same config."""
    file, wanted = run_folder / "config.yaml", as_dict(config)
    if not file.exists():
        write_text(file, yaml.safe_dump(wanted, sort_keys=False))
        return
    if config.resume == "never":
        raise CheckpointError(f"{run_folder} exists and resume=never; choose another run.name or delete the folder.")
    try:
        found: dict[str, Any] = flatten(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, AttributeError):
        raise CheckpointError(f"{file} is not a config; delete {run_folder} to start anew.") from None
    flat = flatten(wanted)
    different = [
        f"{key}: {found.get(key)} there, {flat.get(key)} asked for"
        for key in sorted(found.keys() | flat.keys())
        if found.get(key) != flat.get(key) and not key.startswith(FREE_SETTINGS)
    ]
    if different:
        raise CheckpointError(
            f"{run_folder} belongs to a run with other settings ({'; '.join(different)}). "
            "Choose another run.name, or delete the folder to start anew."
        )
