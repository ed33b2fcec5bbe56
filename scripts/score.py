"""Score a predictions file without a model; the last line is one JSON object. See `python scripts/score.py --help`."""

import gc
import json

from _launch import launch
from omegaconf import DictConfig, OmegaConf


def main(cfg: DictConfig) -> None:
    from hydra.utils import instantiate

    from cobra.config import ScoreConfig, as_config
    from cobra.eval.scoring import score

    gc.disable()  # a short life without cycles: a fifth of the time of VQA-v2
    OmegaConf.set_struct(cfg, False)
    benchmark = cfg.pop("benchmark")
    print(json.dumps(score(as_config(ScoreConfig, cfg), instantiate(benchmark, _convert_="all"))))


if __name__ == "__main__":
    launch("score", main)
