"""Fixtures that run a test once per backend that can run here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from cobra.ops import dispatch, reference

BACKENDS = [name for name in dispatch.discover() if name != "reference"]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend under test and the device that its tests use."""

    module: ModuleType
    device: torch.device

    def skip_unless_supported(self, dtype: torch.dtype) -> None:
        reason = self.module.supports(self.device, dtype)
        if reason is not None:
            pytest.skip(reason)

    def function(self, name: str) -> Callable:
        return getattr(self.module, name, None) or getattr(reference, name)


def _backend(name: str) -> Backend:
    module = dispatch.discover()[name]
    reason = module.available()
    if reason is not None:
        pytest.skip(reason)
    for device in (torch.device("cpu"), torch.device("cuda")):
        if module.supports(device, torch.float32) is None and (device.type == "cpu" or torch.cuda.is_available()):
            return Backend(module=module, device=device)
    pytest.skip(f"no device for {name}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return _backend(request.param)


@pytest.fixture(params=[*BACKENDS, "reference"])
def any_backend(request: pytest.FixtureRequest) -> Backend:
    return _backend(request.param)


@pytest.fixture(autouse=True)
def automatic_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the automatic choice of the backend and leaves it behind."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.choose.cache_clear()
    dispatch.set_backend(None)
    yield
    dispatch.set_backend(None)
    dispatch.choose.cache_clear()
