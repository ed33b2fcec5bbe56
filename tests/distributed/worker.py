"""One rank of the tests: trains what each job says, one after the other, and notes how it ended.

python worker.py JOBS RESULTS, where JOBS is a JSON list of {"port", "overrides"}. The ranks' numbers come from the
environment, as a launcher sets them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import hydra
import torch

from cobra.config import PretrainConfig, as_config
from cobra.errors import CobraError
from cobra.train.run import pretrain

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(jobs: list[dict[str, Any]], results: Path) -> None:
    torch.set_num_threads(1)
    ends: list[str | None] = []
    for job in jobs:
        os.environ["MASTER_PORT"] = str(job["port"])
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = as_config(PretrainConfig, hydra.compose("pretrain", overrides=job["overrides"]))
        try:
            pretrain(config)
            ends.append(None)
        except CobraError as error:
            ends.append(f"{type(error).__name__}: {error}")
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    results.write_text(json.dumps(ends))


if __name__ == "__main__":
    rank = os.environ["RANK"]
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]) / f"{rank}.json")
    sys.stderr.flush()
    os._exit(0)  # gloo's threads at times abort a process that ends in the usual way
