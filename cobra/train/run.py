"""The pretrain journey: a typed config -> a run folder with a trained model in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from cobra.config import PretrainConfig, as_config, as_dict
from cobra.data.dataset import ConversationDataset, open_data
from cobra.data.loader import iterate
from cobra.data.sampler import BatchPlan, check_world_size
from cobra.errors import CheckpointError, DataError
from cobra.hub import resolve_file, resolve_model, resolve_model_folder
from cobra.models.build import build_model, set_trainable
from cobra.models.hugging_face import is_hugging_face
from cobra.models.lora import attach_adapters, merged_state
from cobra.models.public import is_public_run, load_public_run
from cobra.models.vlm import CobraVLM, check_vocabulary
from cobra.models.weights import load_model_folder, parameters_on_meta, save_model_folder, self_contained
from cobra.ops import use_backend
from cobra.ranks import Ranks, joined
from cobra.runtime import pick_device
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer
from cobra.train.checkpoint import Progress
from cobra.train.folder import check_run_folder, check_shared, locked, write_config
from cobra.train.optim import build_optimizer
from cobra.train.parallel import autocasts, make_mesh, prepare, shard, unsharded, whole_state
from cobra.train.plots import plot_run
from cobra.train.stopping import StopRequest
from cobra.train.trackers import build_trackers, drop_after
from cobra.train.trainer import BAD_EXAMPLES_FILE, Trainer

log = logging.getLogger(__name__)

# Asks a benchmark in the middle of training: the model with all its parameters whole on every rank -> metrics.
Validator = Callable[[CobraVLM, Tokenizer, Ranks], dict[str, float]]


def pretrain(config: PretrainConfig, validator: Validator | None = None) -> Path:
    """Train as configured, from scratch or from where the run folder stopped; return the run folder.

    Every rank of a run calls this. Everything that can be checked is checked before the first step: the run folder, the
    data, the weights.

    Args:
        config: all settings; rank 0's count.
        validator: called every `validation.every` steps.

    Raises:
        CobraError: one of its children says what does not fit.
    """
    stop = StopRequest(config.train.max_minutes)
    with joined(config.parallel.device, config.parallel.timeout_minutes) as ranks, use_backend(config.parallel.ops):
        config = as_config(PretrainConfig, ranks.agree(as_dict(config)))
        run_folder = Path(config.paths.runs) / config.run.name
        with locked(run_folder) if ranks.is_first else nullcontext():
            if ranks.is_first:
                check_run_folder(run_folder, config)
            ranks.barrier()
            check_shared(run_folder, ranks)
            _train(config, run_folder, ranks, stop, validator)
    return run_folder


def _train(
    config: PretrainConfig, run_folder: Path, ranks: Ranks, stop: StopRequest, validator: Validator | None
) -> None:
    check_world_size(config.train, ranks.world_size)
    device = _device(config)
    tokenizer = Tokenizer(resolve_file(config.model.llm.tokenizer, "model.llm.tokenizer"))
    check_vocabulary(tokenizer, config.model.llm, f"Set model.llm.vocab_size={len(tokenizer)}.")
    mesh = make_mesh(config.parallel, ranks.world_size, device)
    with parameters_on_meta():
        model = CobraVLM(self_contained(config.model))
    model.config = config.model
    dataset = open_data(
        config.data,
        tokenizer,
        prompt_format(config.model.llm.prompt),
        model.vision.transform,
        max_length=config.model.max_length,
        captions_only=config.train.stage == "align",
    )
    if len(set(ranks.gather(dataset.digest))) > 1:
        raise DataError("The ranks see different rows; give every node the same annotation files and images.")
    plan = BatchPlan(
        dataset.parts,
        config.train,
        rows_per_image=config.data.rows_per_image,
        seed=config.run.seed,
        image_tokens=model.num_image_tokens,
    )

    if ranks.is_first:  # one copy on the host, whatever the number of ranks
        model = _initial_model(config)
    # The others wait here, where they learn at once that rank 0 has failed, and not on a GPU, where nobody tells them.
    ranks.barrier()
    set_trainable(model, config.train.stage)
    if config.train.lora is not None:
        attach_adapters(model, config.train.lora, torch.Generator().manual_seed(config.run.seed))
    prepare(model, config.parallel)
    if mesh is None:
        model.to(device)
    else:
        shard(model, config.parallel, mesh, device)
    optimizer = build_optimizer(model.named_parameters(), config.train)
    trainer = Trainer(config, model, optimizer, ranks, run_folder, Progress(data=dataset.digest), plan.num_steps)
    torch.manual_seed(config.run.seed + ranks.rank)  # what layers draw; a checkpoint puts back its own state
    trainer.resume()
    if trainer.progress.step < plan.num_steps:
        _fit(trainer, dataset, plan, tokenizer, stop, validator)
        _export(trainer, tokenizer)
    else:
        log.info("Run %s has already finished its %d steps.", run_folder, plan.num_steps)
        if ranks.agree(not (run_folder / "model").exists()):  # killed between the last checkpoint and the export
            _export(trainer, tokenizer)
    log.info("Model: %s | loss curve: %s", run_folder / "model", run_folder / "loss.png")


def _device(config: PretrainConfig) -> torch.device:
    device = pick_device(config.parallel.device)
    is_open = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_open else device


def _initial_model(config: PretrainConfig) -> CobraVLM:
    """Build the model as step 0 sees it, on the CPU."""
    start = None if config.init_from is None else _start_folder(config.init_from)  # before weights are read
    if start is None:
        return build_model(config.model, config.run.seed)
    if is_public_run(start):
        return load_public_run(start, config.model, dtype=torch.float32)  # parts it does not hold: as the config says
    return load_model_folder(start, config=config.model, dtype=torch.float32)


def _start_folder(name: str) -> Path:
    """Return the folder that `init_from` names: a run in the public layout, or a model of ours."""
    folder = resolve_model(name)
    if is_hugging_face(folder):
        raise CheckpointError(
            f"init_from={name} is in Hugging Face's form. Turn it back: cobra convert {name} FOLDER --to cobra"
        )
    return folder if is_public_run(folder) else resolve_model_folder(folder)


def _fit(
    trainer: Trainer,
    dataset: ConversationDataset,
    plan: BatchPlan,
    tokenizer: Tokenizer,
    stop: StopRequest,
    validator: Validator | None,
) -> None:
    """Train from where the trainer stands; metrics and plots are written also when it is interrupted."""
    config, ranks, model = trainer.config, trainer.ranks, trainer.model
    run_folder, first_step = trainer.run_folder, trainer.progress.step
    if ranks.is_first:
        write_config(run_folder, config)
        drop_after(run_folder / BAD_EXAMPLES_FILE, first_step)
    learnt = sum(parameter.numel() for parameter in trainer.parameters)
    total = sum(parameter.numel() for parameter in model.parameters())
    where = f"{ranks.world_size} x {model.device.type}" if ranks.world_size > 1 else str(model.device)
    log.info("Run %s on %s: %s of %s parameters learn.", run_folder, where, f"{learnt:,}", f"{total:,}")
    log.info(
        "Data %s: %s rows; %d steps are %.2f epochs.",
        config.data.name,
        f"{dataset.num_rows:,}",
        plan.num_steps,
        plan.num_steps / plan.batches_per_epoch(0),
    )
    steps = iterate(
        dataset,
        plan,
        first_step=first_step,
        num_steps=plan.num_steps,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=config.train.num_workers,
        on_bad_example=config.data.on_bad_example,
    )

    def validate() -> dict[str, float]:
        assert validator is not None
        is_mixed = autocasts(config.parallel, model)
        with unsharded(model, config.parallel), torch.autocast(model.device.type, torch.bfloat16, enabled=is_mixed):
            return validator(model, tokenizer, ranks)

    trackers = build_trackers(config.tracker, run_folder, as_dict(config), first_step) if ranks.is_first else []
    try:
        trainer.fit(steps, trackers, stop=stop, validate=None if validator is None else validate)
    finally:
        for tracker in trackers:
            tracker.close()
        if ranks.is_first:
            try:
                plot_run(run_folder)
            except OSError as error:  # a full disk: metrics.jsonl has what they show
                log.warning("The plots in %s cannot be written (%s).", run_folder, error.strerror or error)
        if trainer.has_stopped:
            ranks.barrier()  # a supervisor may stop all ranks as soon as the first one leaves


def _export(trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Write the model folder from what the ranks hold, adapters merged."""
    ranks, lora = trainer.ranks, trainer.config.train.lora
    state = whole_state(trainer.model, is_first=ranks.is_first)
    if ranks.is_first:
        if lora is not None:
            state = merged_state(state, lora)
        save_model_folder(trainer.model, tokenizer.file, trainer.run_folder / "model", tensors=state)
    ranks.barrier()
