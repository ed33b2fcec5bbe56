"""Train a model: configs -> run folder. `python scripts/pretrain.py --help` lists what can be chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from _launch import CONFIGS, launch
from _ranks import processes_to_start, run_ranks
from omegaconf import DictConfig

if TYPE_CHECKING:
    from cobra.config import PretrainConfig, ValidationConfig
    from cobra.eval.validation import Validation


def main(cfg: DictConfig) -> None:
    from cobra.config import PretrainConfig, as_config, as_dict

    config = as_config(PretrainConfig, cfg)  # wrong settings fail here, before torch is even imported
    check_first_stage(config)
    count = processes_to_start(config.parallel)
    if count > 1:
        from cobra.data.sampler import check_world_size

        check_world_size(config.train, count)  # here it is said once
        run_ranks(as_dict(config), count, Path(__file__).resolve())
        return

    from cobra.train.run import pretrain

    pretrain(config, validator(config.validation))


def check_first_stage(config: PretrainConfig) -> None:
    """Name the command of the stage that this one starts from, where that is an experiment nobody has run yet."""
    from cobra.errors import CheckpointError

    start = Path(config.init_from or "")
    is_ours = start.parent == Path(config.paths.runs) and (CONFIGS / "experiment" / f"{start.name}.yaml").is_file()
    if is_ours and not (start / "model").is_dir():
        raise CheckpointError(
            f"init_from={start}: this run has not finished. It comes first: python scripts/pretrain.py +experiment="
            f"{start.name}   (or name another run or model folder: init_from=FOLDER)"
        )


def validator(config: ValidationConfig) -> Validation | None:
    if config.every is None:
        return None
    from hydra.utils import instantiate

    from cobra.eval.validation import Validation

    return Validation(instantiate(config.benchmark), config)


if __name__ == "__main__":
    launch("pretrain", main)
