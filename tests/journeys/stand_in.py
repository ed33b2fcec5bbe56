"""Started like scripts/pretrain.py by test_launched_ranks.py, but does not train: `run.name` says what its ranks do."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from _launch import launch
from _ranks import processes_to_start, run_ranks
from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    from cobra.config import PretrainConfig, as_config, as_dict

    config = as_config(PretrainConfig, cfg)
    count = processes_to_start(config.parallel)
    if count > 1:
        run_ranks(as_dict(config), count, Path(__file__).resolve())
        return
    from cobra.ranks import joined

    if config.run.name == "late" and os.environ["RANK"] == "1":  # while rank 0 waits for it
        (Path(config.paths.runs) / "1.late").touch()
        time.sleep(600)
    with joined(config.parallel.device, config.parallel.timeout_minutes) as ranks:
        folder = Path(config.paths.runs) / config.run.name
        folder.mkdir(parents=True, exist_ok=True)
        act(config.run.name.split("-")[0], ranks, folder, config.run.seed)


def act(what: str, ranks, folder: Path, seed: int) -> None:
    from cobra.errors import DataError, Interrupted

    facts = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "seed": seed,
        "sum": ranks.sum([ranks.rank, 0.5]),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    (folder / f"{ranks.rank}.json").write_text(json.dumps(facts))
    ranks.barrier()
    if what == "sum" or (what == "save" and ranks.agree((folder / "0.saved").exists())):  # nothing is left to do
        return
    if what == "save":  # what the trainer does: agree on a signal that any rank may have got, save, leave
        arrived: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _frame: arrived.append(number))
        (folder / f"{ranks.rank}.ready").touch()
        while not ranks.sum([len(arrived)])[0]:
            time.sleep(0.05)
        time.sleep(0.3)  # another delivery of the same signal would arrive by now
        (folder / f"{ranks.rank}.saved").write_text(json.dumps(arrived))
        raise Interrupted("Saved.", 130 if signal.SIGINT in arrived else 75)
    (folder / f"{ranks.rank}.ready").touch()
    if what == "all":
        raise DataError("Row 7 is broken.")
    if ranks.rank == 1:
        time.sleep(0.5)
        if what == "error":
            raise DataError("Row 7 is broken.")
        if what == "bug":
            raise ZeroDivisionError("a bug")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if what == "deaf":  # rank 0 never gets to the next message, and takes no hints
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if ranks.rank == 1:
            raise DataError("Row 7 is broken.")
        time.sleep(600)
    while True:
        ranks.barrier()
        time.sleep(0.05)


if __name__ == "__main__":
    launch("pretrain", main)
