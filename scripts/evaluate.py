"""Evaluate a model on a benchmark: predictions, scores, report, pictures. See `python scripts/evaluate.py --help`."""

from pathlib import Path

from _launch import launch
from _ranks import processes_to_start, run_ranks
from omegaconf import DictConfig, ListConfig, OmegaConf


def main(cfg: DictConfig) -> None:
    from hydra.utils import instantiate

    from cobra.config import EvaluateConfig, as_config, as_dict

    OmegaConf.set_struct(cfg, False)
    benchmark = cfg.pop("benchmark")
    config = as_config(EvaluateConfig, cfg)
    count = processes_to_start(config)
    if count > 1:
        asked = OmegaConf.to_container(benchmark, resolve=True)
        run_ranks({**as_dict(config), "benchmark": asked}, count, Path(__file__).resolve())
        return

    from cobra.eval.run import evaluate_all

    several = list(benchmark) if isinstance(benchmark, ListConfig) else [benchmark]
    evaluate_all(config, [instantiate(one, _convert_="all") for one in several])


if __name__ == "__main__":
    launch("evaluate", main)
