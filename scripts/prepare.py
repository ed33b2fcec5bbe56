"""Download, extract, convert, check and index data. See `python scripts/prepare.py --help`."""

from collections.abc import Iterator
from pathlib import Path

import hydra
from _launch import CONFIGS, launch
from omegaconf import DictConfig

from cobra.config import DataConfig, PrepareConfig, as_config


def main(cfg: DictConfig) -> None:
    from hydra.utils import instantiate

    from cobra.data.prepare.run import prepare

    config = as_config(PrepareConfig, cfg)

    def compose(config_name: str, override: str) -> DictConfig:
        composed = hydra.compose(config_name, overrides=[override])
        composed.paths.data = config.paths.data  # as it is: inside an override, quotes and braces would be syntax
        return composed

    def data_config(name: str) -> DataConfig | None:
        if not (CONFIGS / "data" / f"{name}.yaml").is_file():
            return None
        return as_config(DataConfig, compose("pretrain", f"data={name}").data)

    def questions(name: str) -> Iterator[tuple[str, Path, str, str]]:
        benchmark = instantiate(compose("evaluate", f"benchmark={name}").benchmark, _convert_="all")
        for question in benchmark.questions():
            yield question.id, question.image, question.text, benchmark.show_truth(question)

    prepare(config, configs=CONFIGS / "data", data_config=data_config, questions=questions)


if __name__ == "__main__":
    launch("prepare", main)
