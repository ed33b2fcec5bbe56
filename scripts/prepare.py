"""Download, extract, convert, check and index data. See `python scripts/prepare.py --help`."""

from collections.abc import Iterator
from pathlib import Path

import hydra
from _configs import CONFIGS, OWN, has_config
from _launch import launch
from omegaconf import DictConfig

from cobra.config import DataConfig, PrepareConfig, as_config
from cobra.errors import ConfigError


def main(cfg: DictConfig) -> None:
    from hydra.utils import instantiate

    from cobra.data.prepare.run import prepare

    config = as_config(PrepareConfig, cfg)

    def compose(config_name: str, override: str) -> DictConfig:
        composed = hydra.compose(config_name, overrides=[override])
        composed.paths.data = config.paths.data  # as it is: inside an override, quotes and braces would be syntax
        return composed

    def data_config(name: str) -> DataConfig | None:
        if not has_config(f"data/{name}"):
            return None
        return as_config(DataConfig, compose("pretrain", f"data={name}").data)

    def questions(name: str) -> Iterator[tuple[str, Path, str, str]]:
        benchmark = instantiate(compose("evaluate", f"benchmark={name}").benchmark, _convert_="all")
        for question in benchmark.questions():
            yield question.id, question.image, question.text, benchmark.show_truth(question)

    check_own_name(config)
    prepare(config, configs=OWN / "data", data_config=data_config, questions=questions)


def check_own_name(config: PrepareConfig) -> None:
    """Refuse a name under which training would find data of Cobra's instead."""
    own = config.own
    if own.annotations is None or own.config is not None or OWN.resolve() == CONFIGS:
        return
    if (CONFIGS / "data" / f"{own.name}.yaml").is_file():
        raise ConfigError(f"own.name={own.name}: Cobra comes with data of that name; choose another one.")


if __name__ == "__main__":
    launch("prepare", main)
