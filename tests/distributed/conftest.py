"""Runs on several gloo ranks, all on this machine's CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch.distributed import TCPStore

WORKER = Path(__file__).with_name("worker.py")

Ends = list[list["str | None"]]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ends]:
    """Train several configs one after the other on the same ranks; per job, how each rank ended (None: well)."""

    def run(world_size: int, *jobs: Sequence[str]) -> Ends:
        folder = tmp_path_factory.mktemp("ranks")
        stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in jobs]
        listed = [{"port": s.port, "overrides": list(job)} for s, job in zip(stores, jobs, strict=True)]
        (folder / "jobs.json").write_text(json.dumps(listed))
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(folder / "jobs.json"), str(folder)],
                env=os.environ
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")]),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(outputs)
        by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
        return [list(ends) for ends in zip(*by_rank, strict=True)]

    return run
