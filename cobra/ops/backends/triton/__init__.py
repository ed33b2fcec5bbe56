"""A CUDA backend without a compile step at installation: kernels of our own, compiled by Triton at first use.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the same kernels run on CPU tensors, slowly: that
is how they are tested without a GPU. The dispatcher never chooses this by itself, see `ONLY_BY_NAME`.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

NAME = "triton"
PRIORITY = 20
ONLY_BY_NAME = ("cpu",)

_MODULES = {
    "selective_scan": "scan",
    "selective_state_update": "scan",
    "causal_conv1d": "conv",
    "causal_conv1d_update": "conv",
    "add_rms_norm": "norm",
    "stack_step": "step",
    "linear": "matvec",
}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> str | None:
    """None if Triton is installed and there is a CUDA device, or Triton's interpreter is switched on."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "there is no CUDA device; set TRITON_INTERPRET=1 to run its kernels, slowly, on the CPU"


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """CUDA tensors of any floating point dtype; what is not float64 is computed in float32."""
    if device.type == "cuda" or (device.type == "cpu" and _interpreted()):
        return None
    return "it takes CUDA tensors only, or CPU tensors if TRITON_INTERPRET=1"


def __getattr__(name: str) -> Any:
    """Import Triton and the kernels when a function is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return function
