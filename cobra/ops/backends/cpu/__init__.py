"""A fast CPU backend: explicit SIMD kernels compiled by Numba at first use and kept on disk after that."""

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

NAME = "cpu"
PRIORITY = 10

# One step of the convolution is left to the reference: measured faster there for batches of 1 to 200.
_MODULES = {
    "selective_scan": "scan",
    "selective_state_update": "scan",
    "causal_conv1d": "conv",
    "add_rms_norm": "norm",
    "stack_step": "step",
    "linear": "matvec",
}


def available() -> str | None:
    """None if Numba is installed."""
    return None if find_spec("numba") else "numba is not installed; pip install numba"


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """CPU tensors of any floating point dtype; what is not float64 is computed in float32."""
    return None if device.type == "cpu" else "it takes CPU tensors only"


def __getattr__(name: str) -> Any:
    """Import Numba and the kernels when a function is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _drop_stale_kernels()
    function = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return function


def _drop_stale_kernels() -> None:
    """Delete compiled kernels older than any file here: Numba's cache watches the kernels' own files only."""
    folder = Path(__file__).parent
    changed = max(file.stat().st_mtime for file in folder.glob("*.py"))
    for index in (folder / "__pycache__").glob("*.nbi"):
        with suppress(OSError):  # another process was faster, or the folder is not ours
            if index.stat().st_mtime < changed:
                index.unlink()
