"""The processes of a run: who this one is, how it joins the others, and the small messages between them.

torch is imported where it is used, so that a script can ask `env_ranks` before it imports torch.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cobra.errors import ConfigError, RankError
from cobra.runtime import pick_device

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_SLOWEST_WRITE = timedelta(hours=2)  # of a checkpoint, between the first rank that is done and the last
_SECONDS_BEFORE_LEAVING = 2.0  # whoever supervises the ranks sees the one that died first, and blames that one


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. One process alone is rank 0 of 1 and needs no process group.

    The messages go through the host (gloo), never through a GPU, and every rank has to take part in each of them, in
    the same order.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this machine
    host_group: ProcessGroup | None = field(default=None, repr=False, compare=False)  # gloo, for checkpoints alone

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the ranks' values, element by element in float64; the same on every rank."""
        if self.world_size == 1:
            return [float(value) for value in values]
        import torch
        from torch import distributed

        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in their order, on every rank; a value is what JSON can hold."""
        if self.world_size == 1:
            return [_from_bytes(_to_bytes(value))]
        import torch
        from torch import distributed

        mine = _to_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        distributed.all_gather(sizes, torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        distributed.all_gather(buffers, _as_tensor(mine.ljust(longest)))  # JSON does not mind spaces at its end
        return [_from_bytes(buffer.numpy().tobytes()) for buffer in buffers]

    def agree(self, value: T) -> T:
        """Return rank 0's value on every rank; a value is what JSON can hold."""
        if self.world_size == 1:
            return _from_bytes(_to_bytes(value))
        import torch
        from torch import distributed

        mine = _to_bytes(value if self.is_first else None)
        size = torch.tensor([len(mine)])
        distributed.broadcast(size, src=0)
        buffer = _as_tensor(mine) if self.is_first else torch.zeros(int(size), dtype=torch.uint8)
        distributed.broadcast(buffer, src=0)
        return _from_bytes(buffer.numpy().tobytes())

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.sum([0.0])  # torch's own barrier would go through the GPUs


def env_ranks() -> tuple[int, int] | None:
    """Return (rank, world size) if this process was started as one of several, else None."""
    found = _from_environment()
    return None if found is None else (found.rank, found.world_size)


@contextmanager
def joined(device: torch.device | str, timeout_minutes: float) -> Iterator[Ranks]:
    """Join the other processes of the run, if there are any; on a GPU, this process gets the one of its local rank.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout_minutes: a rank that waits longer than this for another one stops.

    Raises:
        ConfigError: the environment does not describe the ranks fully, or there are fewer GPUs than ranks.
        RankError: another rank has died or does not answer.
    """
    ranks = _from_environment()
    if ranks is None:
        yield Ranks()
        return
    from torch import distributed

    on_gpu = _take_device(str(device), ranks)
    _complete_environment()
    timeout = timedelta(minutes=timeout_minutes)
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
        )
        # Only threads that write checkpoints wait here. A wait that fails breaks the group, and no later one is saved.
        host_group = distributed.new_group(backend="gloo", timeout=max(timeout, _SLOWEST_WRITE))
        yield replace(ranks, host_group=host_group)  # type: ignore[arg-type]  # every rank is a member of it
    except RuntimeError as error:
        if not _is_about_a_peer(error):
            raise
        time.sleep(_SECONDS_BEFORE_LEAVING)
        raise RankError(_what_happened(str(error), ranks, timeout_minutes)) from error
    distributed.destroy_process_group()  # not after an error: it would wait for the others


def _from_environment() -> Ranks | None:
    """Return the ranks that torchrun, scripts/_ranks.py or srun has described, or None if this process is alone."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = Ranks(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", default=0))
    elif _is_slurm_task():
        found = Ranks(_number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_LOCALID"))
    else:
        return None
    if not 0 <= found.rank < found.world_size:
        raise ConfigError(f"RANK={found.rank} must be from 0 to WORLD_SIZE={found.world_size} - 1.")
    return found if found.world_size > 1 else None


def _is_slurm_task() -> bool:
    return "RANK" not in os.environ and _number("SLURM_STEP_NUM_TASKS", default=1) > 1


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"The environment variable {name}={text!r} must be a whole number, as torchrun and srun set.")
    return int(text)


def _complete_environment() -> None:
    """Say where rank 0 is to be met, which srun does not do by itself."""
    if _is_slurm_task():
        # Below the range that Linux hands out by itself; steps of one job, and jobs of one node, do not meet.
        port = 10000 + (_number("SLURM_JOB_ID", default=0) * 7 + _number("SLURM_STEP_ID", default=0)) % 20000
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "")))
        os.environ.setdefault("MASTER_PORT", str(port))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"The environment variable {name} is not set; start the ranks with torchrun or srun.")


def _first_host(nodes: str) -> str:
    """Return the first of SLURM's hosts: "gpu[07-09,12],login" -> "gpu07"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group()) if first else "127.0.0.1"


def _take_device(name: str, ranks: Ranks) -> bool:
    """Make this rank's GPU the current one; return whether there is one to be used."""
    import torch

    device = pick_device(name)
    if device.type != "cuda":
        return False
    if device.index is not None:
        raise ConfigError(f"parallel.device={name} is one GPU, but there are {ranks.world_size} ranks; use cuda.")
    count = torch.cuda.device_count()
    own = 0 if count == 1 and _is_slurm_task() else ranks.local_rank  # srun may show each task its own GPU only
    if own >= count:
        raise ConfigError(f"Local rank {own} has no GPU: torch sees {count}. Start one process per GPU.")
    torch.cuda.set_device(own)
    return True


def _is_about_a_peer(error: RuntimeError) -> bool:
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _what_happened(message: str, ranks: Ranks, timeout_minutes: float) -> str:
    if "timed out" in message.lower() or "timeout" in message.lower():
        return (
            f"Rank {ranks.rank} of {ranks.world_size} has waited for another rank for {timeout_minutes:g} minutes. "
            "Look at the other ranks' messages; if one of them needs longer, raise parallel.timeout_minutes."
        )
    other = f"Rank {1 - ranks.rank}" if ranks.world_size == 2 else "Another rank"
    return f"{other} of {ranks.world_size} has died; its own message says why. Rank {ranks.rank} stops too."


def _to_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


def _from_bytes(data: bytes) -> Any:
    return json.loads(data)


def _as_tensor(data: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
