"""Training adapters on a frozen language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cobra.config import PretrainConfig
from cobra.models.build import build_model
from cobra.models.sharded import read_sharded
from cobra.models.weights import load_model_folder, untied_state
from cobra.train.run import pretrain

from .runs import assert_equal, interrupt_after_second_save, losses, state, weights

OPTIONS = ["train.max_steps=30", "train.save_every=10", "train.learning_rate=1e-2", "train.num_workers=0"]


@pytest.fixture(scope="module")
def train(tiny_config, small_overrides) -> Callable[..., Path]:
    """Train adapters on the small model."""
    return lambda runs, *more: pretrain(tiny_config("train=lora", *small_overrides(runs), *OPTIONS, *more))


@pytest.fixture(scope="module")
def adapted(train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def config(tiny_config, small_overrides) -> PretrainConfig:
    return tiny_config("train=lora", *small_overrides(Path("nowhere")), *OPTIONS)


def test_loss_falls(adapted: Path) -> None:
    values = losses(adapted)
    assert len(values) == 30 and sum(values[-5:]) < 0.85 * sum(values[:5])


def test_checkpoint_holds_the_base_as_it_was_and_moments_of_adapters_alone(adapted: Path, config) -> None:
    found = read_sharded(adapted / "checkpoints" / "step-000030")
    base = untied_state(build_model(config.model, config.run.seed))
    assert base.keys() == {name for name in found if ".adapter." not in name}
    for name, tensor in base.items():
        assert torch.equal(found[name], tensor) != name.startswith("projector."), name
    adapters = {name for name in found if ".adapter." in name}
    assert len(adapters) == 2 * (4 * 2 + 1)  # A and B of four projections in two blocks, and of the head
    assert all(found[name].any() for name in adapters)  # B started at zero
    moments = {key for key in state(adapted / "checkpoints" / "step-000030") if key.endswith(".exp_avg")}
    learns = adapters | {name for name in base if name.startswith("projector.")}
    assert moments == {f"optimizer.{name}.exp_avg" for name in learns}


def test_export_is_base_plus_adapters(adapted: Path, config) -> None:
    found = read_sharded(adapted / "checkpoints" / "step-000030")
    exported = weights(adapted)
    assert exported.keys() == {name for name in found if ".adapter." not in name}
    lora = config.train.lora
    for name, tensor in exported.items():
        module = name.removesuffix(".weight").replace("backbone.embedding", "lm_head")
        A, B = (found.get(f"{module}.adapter.{part}") for part in "AB")
        expected = found[name].double()
        if name.endswith(".weight") and A is not None and B is not None:
            expected = expected + lora.alpha / lora.rank * B.double() @ A.double()
            assert not torch.equal(tensor, found[name]), name
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    load_model_folder(adapted / "model")  # a plain model


def test_resumed_run_has_the_same_bits(train, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after_second_save(patch)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    run = train(tmp_path, "train.num_workers=1")
    assert_equal(weights(run), weights(adapted))
    assert_equal(*(state(folder / "checkpoints" / "step-000030") for folder in (run, adapted)))
    assert losses(run) == losses(adapted)
