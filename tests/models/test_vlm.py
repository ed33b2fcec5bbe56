"""CobraVLM: shared images, the loss at labelled positions only, frozen parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cobra.config import ModelConfig, ProjectorConfig
from cobra.errors import ConfigError, DataError, ShapeError
from cobra.models.build import TRAINED_PARTS, build_model, set_trainable
from cobra.models.vlm import CobraOutput, CobraVLM, check_vocabulary
from cobra.text.prompt import IGNORE_INDEX
from cobra.text.tokenizer import Tokenizer

ROUNDING = 1e-12  # float64 sums of some hundred terms of size 1, in another order


@pytest.fixture
def model(small_model: CobraVLM) -> CobraVLM:
    return small_model.double()


def random_images(count: int) -> list[Tensor]:
    """Views of images that differ strongly: flat colours with a square of noise."""
    rng = np.random.default_rng(0)
    images = np.broadcast_to(rng.integers(0, 256, (count, 3, 1, 1)), (count, 3, 64, 64)).astype(np.uint8)
    images[:, :, 8:40, 16:48] = rng.integers(0, 256, (count, 3, 32, 32))
    return [torch.from_numpy(images)]


def random_rows(count: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """Token ids, and labels: those ids at some positions, including the first and the last."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(1, 365, (count, length), generator=generator)
    keep = torch.rand(ids.shape, generator=generator) < 0.4
    keep[:, 0], keep[:, 1], keep[:, -1] = True, False, True
    return ids, torch.where(keep, ids, IGNORE_INDEX)


def gradients(model: CobraVLM, output: CobraOutput) -> dict[str, Tensor]:
    assert output.loss is not None
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def assert_gradients_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=ROUNDING * largest, msg=name)


def full_pass(model: CobraVLM, pixels: list[Tensor], ids: Tensor) -> Tensor:
    """Logits of [image tokens, text] as one sequence in one pass: what the shared prefix must equal."""
    sequence = torch.cat([model.projector(model.vision(pixels)), model.llm.embed(ids)], dim=1)
    hidden, _ = model.llm(sequence)
    return model.llm.head(hidden)


def test_shared_image_equals_one_copy_per_row(model: CobraVLM) -> None:
    set_trainable(model, "full-finetune")
    pixels, (ids, labels) = random_images(2), random_rows(5)
    index = torch.tensor([0, 1, 1, 0, 1])
    shared = model(ids, pixels=pixels, labels=labels, image_index=index)
    copied = model(ids, pixels=[view[index] for view in pixels], labels=labels)
    assert shared.loss.item() == pytest.approx(copied.loss.item(), rel=ROUNDING)
    torch.testing.assert_close(shared.logits, copied.logits, rtol=0, atol=1e-10)
    assert_gradients_equal(gradients(model, shared), gradients(model, copied))


def test_loss_equals_cross_entropy_of_one_long_sequence(model: CobraVLM) -> None:
    set_trainable(model, "full-finetune")
    pixels, (ids, labels) = random_images(3), random_rows(3)
    output = model(ids, pixels=pixels, labels=labels)
    logits = full_pass(model, pixels, ids)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-10)
    all_labels = torch.cat([torch.full((3, model.vision.num_patches), IGNORE_INDEX), labels], dim=1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), all_labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    assert output.loss.item() == pytest.approx(loss.item(), rel=ROUNDING)
    assert int(output.num_labels) == int((labels != IGNORE_INDEX).sum())
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
    assert_gradients_equal(gradients(model, output), {n: g for n, g in expected.items() if g is not None})


def test_padding_and_lengths_change_no_loss_and_no_row(model: CobraVLM) -> None:
    pixels, (ids, labels) = random_images(2), random_rows(2)
    lengths = torch.tensor([4, 9])
    labels[0, 4:] = IGNORE_INDEX
    other = ids.clone()
    other[0, 4:] = 7
    first, second = (model(x, pixels=pixels, labels=labels, lengths=lengths) for x in (ids, other))
    assert first.loss == second.loss
    alone = model(ids[:1, :4], pixels=[view[:1] for view in pixels])
    for layer in range(model.config.llm.num_layers):
        torch.testing.assert_close(first.state.ssm[layer], second.state.ssm[layer], rtol=0, atol=0)
        torch.testing.assert_close(first.state.ssm[layer][:1], alone.state.ssm[layer], rtol=0, atol=1e-10)


def test_text_batch_equals_language_model_alone(model: CobraVLM) -> None:
    ids, labels = random_rows(3)
    output = model(ids, labels=labels)
    logits = model.llm.head(model.llm(model.llm.embed(ids))[0])
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-10)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert int(output.num_labels) == int((labels[:, 1:] != IGNORE_INDEX).sum())  # the first token follows nothing


def test_head_sees_labelled_positions_only(small_model: CobraVLM) -> None:
    rows: list[int] = []
    small_model.llm.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    ids, labels = random_rows(3)
    output = small_model(ids, pixels=random_images(3), labels=labels)
    assert rows == [int(output.num_labels)] and rows[0] < ids.numel()


def test_label_outside_the_vocabulary_is_refused(small_model: CobraVLM) -> None:
    ids, labels = random_rows(3)
    labels[1, -1] = 50_000
    with pytest.raises(DataError, match="label is 50000"):
        small_model(ids, labels=labels)


def test_image_changes_the_answer(tiny_model: CobraVLM) -> None:
    """With PyTorch's default initialisation swapping the image moved the logits by 0.0001, and nothing was learnt."""
    ids, _ = random_rows(1)
    with torch.no_grad():
        logits = tiny_model(ids.expand(4, -1), pixels=random_images(4)).logits[:, -1]
    assert (logits - logits[0]).abs().amax(dim=1)[1:].min() > 0.01


@pytest.fixture
def tiny_model(tiny_config) -> CobraVLM:
    return build_model(tiny_config().model, seed=0)


@pytest.mark.parametrize("stage", TRAINED_PARTS)
def test_stage_trains_its_parts_and_freezes_the_rest(small_model: CobraVLM, stage: str) -> None:
    set_trainable(small_model, stage)
    ids, labels = random_rows(2)
    small_model(ids, pixels=random_images(2), labels=labels).loss.backward()
    expected = {
        "align": {"projector"},
        "finetune": {"projector", "llm"},
        "full-finetune": {"projector", "llm", "vision"},
    }
    moved = {
        n.split(".")[0] for n, p in small_model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert moved == expected[stage]


def test_same_seed_builds_the_same_model(small_model_config: ModelConfig) -> None:
    before = torch.get_rng_state()
    first, again, other = (build_model(small_model_config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's draws are not disturbed
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.projector.projector[0].weight, other.projector.projector[0].weight)
    assert all(map(torch.equal, first.vision.state_dict().values(), other.vision.state_dict().values()))  # pretrained


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_16_bits_are_trained_in_32(
    small_model: CobraVLM, small_model_config: ModelConfig, tmp_path: Path, dtype: torch.dtype
) -> None:
    """As the public Mambas are stored; the shipped towers are, too."""
    stored = {name: tensor.to(dtype) for name, tensor in small_model.llm.state_dict().items()}
    torch.save(stored, tmp_path / "pytorch_model.bin")
    config = replace(small_model_config, llm=replace(small_model_config.llm, weights=str(tmp_path)))
    model = build_model(config, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, parameter in model.llm.named_parameters():
        assert torch.equal(parameter, stored[name].float()), name


@pytest.mark.parametrize("kind", ["linear", "gelu-mlp", "fused-gelu-mlp"])
def test_every_projector_reads_and_learns(tiny_config, kind: str) -> None:
    model = build_model(tiny_config(f"model/projector={kind}", "model.projector.expansion=2").model, seed=0)
    tokens = model.embed_images(random_images(2))
    assert tokens.shape == (2, 64, 128)
    assert 0.3 < tokens.std() / model.vision(random_images(2)).std() < 3  # tokens start at the features' size
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())


def test_shapes_that_do_not_fit_are_refused(small_model: CobraVLM) -> None:
    (ids, labels), pixels = random_rows(3), random_images(2)
    with pytest.raises(ShapeError, match="3 rows but there are images for 2"):
        small_model(ids, pixels=pixels)
    with pytest.raises(ShapeError, match="labels"):
        small_model(ids, labels=labels[:, :-1])
    with pytest.raises(ShapeError, match="image_index"):
        small_model(ids, image_index=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="2 views"):
        small_model(ids[:2], pixels=pixels * 2)


@pytest.mark.parametrize("grid", [None, 3, 8])
def test_pooled_images_are_prefixes_of_fewer_tokens(small_model_config: ModelConfig, grid: int | None) -> None:
    model = build_model(replace(small_model_config, projector=ProjectorConfig(kind="ldpv2", grid=grid)), seed=0)
    ids, labels = random_rows(2)
    output = model(ids, pixels=random_images(2), labels=labels)
    assert model.num_image_tokens == (grid or 4) ** 2
    assert output.hidden.shape[:2] == (2, model.num_image_tokens + ids.shape[1])


def test_impossible_grid_is_refused_when_the_model_is_built(small_model_config: ModelConfig) -> None:
    config = replace(small_model_config, projector=ProjectorConfig(kind="ldpv2", grid=9))
    with pytest.raises(ConfigError, match=r"model\.projector\.grid=9 is more than the 8 x 8 patches.*at most 8"):
        CobraVLM(config)


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "fits", "misfits"),
    [
        (50277, 8, (50277, 50280, 50254), (50281, 50024, 365)),  # Mamba-2.8B; 50254 without the added tokens
        (50432, 8, (50277, 50432), (50433, 50176)),  # Mamba-7B: 197 x 256 rows
        (50304, 1, (50277,), (50305, 49000)),  # the Hugging Face layout says nothing about padding
        (365, 8, (365, 368, 361), (369, 360, 257)),
        (365, 64, (365, 321), (385, 320)),
    ],
)
def test_only_a_tokenizer_of_about_the_size_fits(
    vocab_size: int,
    multiple: int,
    fits: tuple[int, ...],
    misfits: tuple[int, ...],
    small_model_config: ModelConfig,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = replace(small_model_config.llm, vocab_size=vocab_size, pad_vocab_multiple=multiple)
    for size in fits + misfits:
        monkeypatch.setattr(Tokenizer, "__len__", lambda _, size=size: size)
        with nullcontext() if size in fits else pytest.raises(ConfigError, match=rf"{size} entries in .*\. Do this\."):
            check_vocabulary(tokenizer, llm, "Do this.")


def test_towers_of_different_grids_are_refused(tiny_config) -> None:
    with pytest.raises(ConfigError, match="same number of patches"):
        build_model(tiny_config("model.vision.towers.0.image_size=32", "model.vision.towers.0.weights=random").model, 0)
