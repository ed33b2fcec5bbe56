"""Choose the backend of each call: the forced one, else the first of `cobra/ops/backends` that can run it.

A backend is a module or package in that folder whose name does not start with an underscore. It defines

    NAME: str
    PRIORITY: int                       higher is asked first
    available() -> str | None           None if it can run on this machine, else what to install
    supports(device, dtype) -> str | None   None if it takes such tensors, else why not

and any of the five functions of `cobra.ops`; those it lacks come from the next backend. It may also define

    ONLY_BY_NAME                        device types for whose tensors it is never chosen unless asked for
    declines(function, **arguments) -> str | None   None if it takes this call, else why another should have it

and functions of `cobra.ops.fused`, which come from the first choice that has them; a backend that was asked for by name
leaves none to others.

Importing it must be cheap: what it needs is imported when a function is first taken from it.
"""

import importlib
import logging
import os
import pkgutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from cobra.errors import BackendError

from . import backends, reference

ENVIRONMENT_VARIABLE = "COBRA_OPS_BACKEND"
FUNCTIONS = ("selective_scan", "selective_state_update", "causal_conv1d", "causal_conv1d_update", "add_rms_norm")

T = TypeVar("T", bound=Callable[..., Any])

_log = logging.getLogger(__name__)
_forced: str | None = None
_modules: dict[str, ModuleType] = {}  # those that calls have used


def _constant_to_the_compiler(function: T) -> T:
    """What `torch.compiler.assume_constant_result` does, without its import of the whole compiler: two seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
def discover() -> dict[str, ModuleType]:
    """All backends by name, in the order in which they are asked; the reference is the last."""
    names = [info.name for info in pkgutil.iter_modules(backends.__path__) if not info.name.startswith("_")]
    modules = [importlib.import_module(f"{backends.__name__}.{name}") for name in names]
    modules.sort(key=lambda module: (-module.PRIORITY, module.NAME))
    return {module.NAME: module for module in [*modules, reference]}


@_constant_to_the_compiler
def _from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return None if name in (None, "", "auto") else name


def forced_backend() -> str | None:
    """The name asked for by `use_backend`, else by the environment variable, else None."""
    return _forced or _from_environment()


def set_backend(name: str | None) -> None:
    """Use one backend for every call from now on; None or "auto" leave it to the environment and the automatic choice.

    Raises: BackendError if the name is unknown or the backend cannot run on this machine.
    """
    global _forced
    if name == "auto":
        name = None
    if name is not None:
        _require(name)
    _forced = name


@contextmanager
def use_backend(name: str | None) -> Generator[None, None, None]:
    """`set_backend` for the length of a `with` block; for the whole process, other threads included."""
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
def choose(device_type: str, dtype: torch.dtype, name: str | None) -> tuple[tuple[ModuleType, ...], str]:
    """The backends for tensors of this kind, best first, and why the first was chosen. Logged once.

    Raises: BackendError if the one asked for by `name` cannot be had.
    """
    device = torch.device(device_type)
    offered = [module for module in discover().values() if device_type not in getattr(module, "ONLY_BY_NAME", ())]
    fitting = [module for module in offered if module.supports(device, dtype) is None]
    missing = {module.NAME: reason for module in fitting if (reason := module.available()) is not None}
    usable = [module for module in fitting if module.NAME not in missing]
    reason = "the first available" if not missing else f"the first available ({', '.join(missing)} missing)"
    if name is not None:
        forced = _require(name)
        refusal = forced.supports(device, dtype)
        if refusal is not None:
            raise BackendError(f"The ops backend {name!r} does not take {dtype} on {device_type}: {refusal}.")
        usable = [forced, *(module for module in usable if module is not forced)]
        reason = "asked for by name"
    elif usable[0] is reference and missing:
        hints = "; ".join(f"{other}: {why}" for other, why in missing.items())
        _log.warning("Using the slow reference ops on %s, faster backends are missing (%s).", device_type, hints)
    elif usable[0] is reference and device_type != "meta":
        _log.warning("Using the slow reference ops on %s: there is no faster backend for it yet.", device_type)
    _log.info("Ops backend for %s on %s: %s, %s.", dtype, device_type, usable[0].NAME, reason)
    return tuple(usable), reason


@_constant_to_the_compiler
def _candidates(function: str, device_type: str, dtype: torch.dtype, name: str | None) -> tuple[str, ...]:
    """The names of the chosen backends that have a function, best first.

    For torch.compile this is a constant: compiled code keeps the backend that it was traced with, and is traced again
    when `set_backend` names another.
    """
    having = [module for module in choose(device_type, dtype, name)[0] if hasattr(module, function)]
    _modules.update({module.NAME: module for module in having})
    return tuple(module.NAME for module in having)


def implementation(function: str, main: torch.Tensor, arguments: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The chosen backend's version of one of the five functions.

    Args:
        main: the argument that decides on device and dtype.
        arguments: others, for backends that decline some calls. A backend that was asked for by name gets every call,
            and raises BackendError itself for what it cannot do.
    """
    # Nothing to compute: spares every backend the empty cases. Forward-mode derivatives: only plain operations have
    # them, and an operator without them would pass for a constant.
    level: int = forward_ad._current_level  # pyright: ignore  there is no public way to ask
    if main.numel() == 0 or level >= 0:
        return getattr(reference, function)
    asked_for = forced_backend()
    for name in _candidates(function, main.device.type, main.dtype, asked_for):
        module = _modules[name]
        declines = None if name == asked_for else getattr(module, "declines", None)
        if declines is None or declines(function, **(arguments or {})) is None:
            return getattr(module, function)
    raise AssertionError("the reference has all functions and takes all calls")


def fused_implementation(function: str, main: torch.Tensor) -> Callable[..., Any] | None:
    """The first choice that has a function of `cobra.ops.fused`; None if none has, or the one asked for by name."""
    asked_for = forced_backend()
    chosen = choose(main.device.type, main.dtype, asked_for)[0]
    # Whoever asks for a backend by name wants its numbers, not those of another one's kernel.
    offered = chosen if asked_for is None else chosen[:1]
    return next((getattr(module, function) for module in offered if hasattr(module, function)), None)
