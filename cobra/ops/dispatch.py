"""Choose the backend of each call: the forced one, else the first of `cobra/ops/backends` that can run it.

A backend is a module or package in that folder whose name does not start with an underscore. It defines

    NAME: str
    PRIORITY: int                       higher is asked first
    available() -> str | None           None if it can run on this machine, else what to install
    supports(device, dtype) -> str | None   None if it takes such tensors, else why not

and any of the five functions of `cobra.ops`; those it lacks come from the reference. It may also define `ONLY_BY_NAME`,
a tuple of device types for whose tensors it is never chosen unless asked for. Importing it must be cheap: what it needs
is imported when a function is first taken from it.
"""

import importlib
import logging
import os
import pkgutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

from cobra.errors import BackendError

from . import backends, reference

ENVIRONMENT_VARIABLE = "COBRA_OPS_BACKEND"

_log = logging.getLogger(__name__)
_forced: str | None = None


@cache
def discover() -> dict[str, ModuleType]:
    """All backends by name, in the order in which they are asked; the reference is the last."""
    names = [info.name for info in pkgutil.iter_modules(backends.__path__) if not info.name.startswith("_")]
    modules = [importlib.import_module(f"{backends.__name__}.{name}") for name in names]
    modules.sort(key=lambda module: (-module.PRIORITY, module.NAME))
    return {module.NAME: module for module in [*modules, reference]}


def forced_backend() -> str | None:
    """The name asked for by `use_backend`, else by the environment variable, else None."""
    return _forced or os.environ.get(ENVIRONMENT_VARIABLE) or None


def set_backend(name: str | None) -> None:
    """Use one backend for every call from now on; None restores the automatic choice.

    Raises: BackendError if the name is unknown or the backend cannot run on this machine.
    """
    global _forced
    if name is not None:
        _require(name)
    _forced = name


@contextmanager
def use_backend(name: str | None) -> Generator[None, None, None]:
    """`set_backend` for the length of a `with` block."""
    previous = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def _require(name: str) -> ModuleType:
    known = discover()
    if name not in known:
        raise BackendError(f"Unknown ops backend {name!r}; known backends: {', '.join(known)}.")
    reason = known[name].available()
    if reason is not None:
        raise BackendError(f"The ops backend {name!r} cannot run here: {reason}.")
    return known[name]


@cache
def choose(device_type: str, dtype: torch.dtype, name: str | None) -> tuple[ModuleType, str]:
    """The backend for tensors of this kind and why it was chosen; `name` is the forced one, if any. Logged once."""
    device = torch.device(device_type)
    if name is not None:
        module = _require(name)
        refusal = module.supports(device, dtype)
        if refusal is not None:
            raise BackendError(f"The ops backend {name!r} does not take {dtype} on {device_type}: {refusal}.")
        reason = "asked for by name"
    else:
        offered = [module for module in discover().values() if device_type not in getattr(module, "ONLY_BY_NAME", ())]
        fitting = [module for module in offered if module.supports(device, dtype) is None]
        missing = {module.NAME: reason for module in fitting if (reason := module.available()) is not None}
        module = next(module for module in fitting if module.NAME not in missing)
        if module is reference and missing:
            hints = "; ".join(f"{other}: {why}" for other, why in missing.items())
            _log.warning("Using the slow reference ops on %s, faster backends are missing (%s).", device_type, hints)
        elif module is reference and device_type != "meta":
            _log.warning("Using the slow reference ops on %s: there is no faster backend for it yet.", device_type)
        reason = "the first available" if not missing else f"the first available ({', '.join(missing)} missing)"
    _log.info("Ops backend for %s on %s: %s, %s.", dtype, device_type, module.NAME, reason)
    return module, reason


def implementation(function: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The chosen backend's version of one of the five functions, for arguments like `tensor`."""
    if tensor.numel() == 0:  # nothing to compute: spares every backend the empty cases
        return getattr(reference, function)
    module, _ = choose(tensor.device.type, tensor.dtype, forced_backend())
    return getattr(module, function, None) or getattr(reference, function)
