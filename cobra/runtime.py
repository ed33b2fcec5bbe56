"""The process: device, memory, logging, files that are written whole or not at all.

torch is imported where it is used, so that a script's `--help` does not wait for it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cobra.errors import ConfigError

if TYPE_CHECKING:
    import torch

_MEMORY_UNKNOWN = 8 * 2**30  # what most machines have


def pick_device(name: str) -> torch.device:
    """Return the device called `name`: "cpu", "cuda", "cuda:1", or "auto", which is CUDA where there is one.

    Raises:
        ConfigError: the name is none of these, or there is no such device here.
    """
    import torch

    name = str(name)  # a torch.device will do
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if name != "cpu" and not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise ConfigError(f"device={name!r} is not a device to compute on; use auto, cpu, cuda or cuda:0.")
    if name != "cpu" and not count:
        raise ConfigError(f"device={name!r}, but torch sees no CUDA device here; use device=cpu or device=auto.")
    if int(name.partition(":")[2] or 0) >= max(count, 1):
        raise ConfigError(
            f"device={name!r}, but torch sees only {count} CUDA devices here; use cuda:{count - 1} or less."
        )
    return torch.device(name)


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the process on a CPU (0 on Windows), of torch's allocations on a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":  # has no module `resource`
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def total_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or of this machine's, as far as this process may use it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return _MEMORY_UNKNOWN
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, int(text)) if text.isdecimal() else memory


def require(user: str, *packages: str, extra: str) -> None:
    """Raise ConfigError unless the packages of an extra are installed, without importing them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{user} needs {' and '.join(missing)}: pip install 'cobra-vlm[{extra}]'")


def setup_logging(rank: int = 0) -> None:
    """Send the library's messages to standard error, above any progress bar; for scripts, once.

    INFO is shown for rank 0 only; the other ranks show warnings and errors, with their number.
    """
    text = "%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"
    logging.basicConfig(level=logging.WARNING, format=text, handlers=[_AboveProgressBar()])
    logging.getLogger("cobra").setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _AboveProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record) + "\n", file=sys.stderr, end="")  # in one piece: ranks share the terminal


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename: readers see the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        write(temporary)
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_to_disk(file: Path) -> None:
    """Wait until a file's content has reached the disk, so that a rename never runs ahead of it."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
