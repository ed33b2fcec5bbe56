"""Fixtures that run a test once per backend that can run here.

Triton's kernels run on a GPU, or through its interpreter in a process of their own, see `test_triton.py`.
"""

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

    def skip_if_slow(self, steps: int) -> None:
        """Skip what would take long, counted in steps of all rows, where kernels are interpreted, not compiled."""
        if steps > 20 and self.module.NAME == "triton" and self.device.type == "cpu":
            pytest.skip("too slow in Triton's interpreter; test_triton.py has smaller cases")

    def skip_unless_packed(self) -> None:
        if self.module.NAME == "mamba_ssm":
            pytest.skip("the official kernels know no resets")

    def skip_unless_repeatable(self) -> None:
        if self.module.NAME == "mamba_ssm":
            pytest.skip("the official kernels sum gradients by atomic additions, in any order")

    def function(self, name: str) -> Callable:
        return getattr(self.module, name, None) or getattr(reference, name)


def make_backend(name: str) -> Backend:
    """The backend of this name and the device to test it on; skips the test if there is none."""
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
    return make_backend(request.param)


@pytest.fixture(params=[*BACKENDS, "reference"])
def any_backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture(autouse=True)
def automatic_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the automatic choice of the backend and leaves it behind."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.choose.cache_clear()
    dispatch.set_backend(None)
    yield
    dispatch.set_backend(None)
    dispatch.choose.cache_clear()
