"""A fast CPU backend: explicit SIMD kernels compiled by Numba at first use and kept on disk after that."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

NAME = "cpu"
PRIORITY = 10
SMALL_STEP = 100_000  # numbers of the state of a single step; measured

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
    """None if Numba is installed and can be imported; asked only when a choice is due."""
    if find_spec("numba") is None:
        return "numba is not installed; pip install numba"
    try:
        import_module("numba")
    except Exception as error:  # for example made for another version of NumPy; whatever it is, others can do without
        return f"numba cannot be imported ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """CPU tensors of any floating point dtype; what is not float64 is computed in float32."""
    return None if device.type == "cpu" else "it takes CPU tensors only"


def declines(function: str, **arguments: Any) -> str | None:
    """Single steps that are over before a kernel of ours has begun."""
    if function == "selective_state_update" and arguments["u"].numel() * arguments["A"].shape[1] < SMALL_STEP:
        return "so small a step is faster in plain PyTorch"
    return None


def __getattr__(name: str) -> Any:
    """Import Numba and the kernels when a function is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return function
