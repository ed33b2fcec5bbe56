"""Parameter groups and the learning rate."""

from __future__ import annotations

import math

import pytest

from cobra.config import TrainConfig
from cobra.models.build import set_trainable
from cobra.train.optim import build_optimizer, learning_rate


def test_decay_spares_vectors_and_the_scan(small_model) -> None:
    set_trainable(small_model, "full-finetune")
    config = TrainConfig(
        stage="full-finetune",
        global_batch_size=1,
        per_device_batch_size=1,
        learning_rate=1.0,
        max_steps=1,
        weight_decay=0.1,
    )
    decayed, spared = build_optimizer(small_model.named_parameters(), config).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in small_model.named_parameters()}
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    assert {id(p) for p in decayed["params"] + spared["params"]} == names.keys()
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    for name in names.values():
        must_spare = name.endswith(
            ("bias", "A_log", ".D", "norm.weight", "norm_f.weight", "norm1.weight", "norm2.weight")
        )
        assert not must_spare or name in spared_names, name
    assert all(f"llm.backbone.layers.0.mixer.{n}_proj.weight" not in spared_names for n in ("in", "x", "dt", "out"))


@pytest.mark.parametrize(("num_steps", "warmup_ratio", "warmup"), [(100, 0.05, 5), (40, 0.0, 0), (7, 0.5, 4)])
def test_schedule_is_linear_then_cosine(num_steps: int, warmup_ratio: float, warmup: int) -> None:
    config = TrainConfig(
        stage="align",
        global_batch_size=1,
        per_device_batch_size=1,
        learning_rate=2.0,
        max_steps=num_steps,
        warmup_ratio=warmup_ratio,
    )
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    for step, rate in enumerate(rates):
        if step < warmup:
            expected = 2.0 * (step + 1) / warmup
        else:
            expected = 2.0 * math.cos(0.5 * math.pi * (step - warmup) / (num_steps - warmup)) ** 2
        assert rate == pytest.approx(expected, rel=1e-12)
    assert max(rates) == 2.0 and min(rates) > 0
