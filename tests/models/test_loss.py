"""The loss in chunks against cross-entropy over all positions at once, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra.errors import ConfigError, DataError, ShapeError
from cobra.models.loss import labelled_loss
from cobra.text.prompt import IGNORE_INDEX

VOCAB, WIDTH, ROWS, LENGTH = 40, 6, 4, 9
ROUNDING = 1e-13  # float64, sums of some dozen terms of size 1


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, hidden states and labels, of which 21 are real."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, WIDTH, generator=generator))
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    labels.view(-1)[torch.randperm(ROWS * LENGTH, generator=generator)[21:]] = IGNORE_INDEX
    return head, hidden, labels


class RowCounter:
    """A head that remembers how many rows each call had."""

    def __init__(self, head: nn.Module) -> None:
        self.head, self.rows = head, list[int]()

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.shape[0])
        return self.head(hidden)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 21, 22, 1024])
def test_chunks_equal_cross_entropy_of_all_positions(chunk: int) -> None:
    head, hidden, labels = make_batch()
    logits = head(hidden)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss, count = labelled_loss(head, hidden, labels, chunk=chunk)
    assert int(count) == 21 and count.dtype == torch.int64
    torch.testing.assert_close(loss, expected, rtol=ROUNDING, atol=0)
    leaves = (hidden, head.weight)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_float32_whatever_the_model(dtype: torch.dtype) -> None:
    head, hidden, labels = make_batch(dtype)
    loss, _ = labelled_loss(head, hidden, labels, chunk=5)
    expected = F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # float32, 21 terms in another order
    loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype


def test_head_never_sees_more_than_a_chunk() -> None:
    head, hidden, labels = make_batch()
    counter = RowCounter(head)
    loss, _ = labelled_loss(counter, hidden, labels, chunk=8)
    assert counter.rows == [8, 8, 5]
    loss.backward()
    assert sorted(counter.rows) == [5, 5, 8, 8, 8, 8]  # the backward pass computes each chunk again


def test_single_chunk_is_computed_once() -> None:
    head, hidden, labels = make_batch()
    counter = RowCounter(head)
    labelled_loss(counter, hidden, labels, chunk=21)[0].backward()
    assert counter.rows == [21]


def test_nothing_is_recomputed_without_gradients() -> None:
    head, hidden, labels = make_batch()
    with torch.no_grad():
        loss, _ = labelled_loss(head, hidden, labels, chunk=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, labelled_loss(head, hidden, labels)[0].detach(), rtol=ROUNDING, atol=0)


def test_memory_kept_for_backward_does_not_grow_with_the_vocabulary() -> None:
    def kept(vocab: int, chunk: int) -> int:
        """Bytes saved for the backward pass, besides the head's weight."""
        head, hidden = nn.Linear(WIDTH, vocab, bias=False), torch.randn(50, WIDTH, requires_grad=True)
        sizes: dict[int, int] = {head.weight.untyped_storage().data_ptr(): 0}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = labelled_loss(head, hidden, torch.zeros(50, dtype=torch.int64), chunk=chunk)
        loss.backward()
        return sum(sizes.values())

    assert kept(5000, chunk=50) >= 50 * 5000 * 4  # one chunk: the logits are kept
    assert kept(5000, chunk=8) == kept(50, chunk=8) < 50 * WIDTH * 4 * 3


def test_batch_without_labels_has_zero_gradients() -> None:
    head, hidden, labels = make_batch()
    loss, count = labelled_loss(head, hidden, torch.full_like(labels, IGNORE_INDEX), chunk=4)
    assert loss.item() == 0 and int(count) == 0
    loss.backward()
    for leaf in (hidden, head.weight):
        assert leaf.grad is not None and not leaf.grad.any()


def test_unlabelled_positions_may_hold_anything() -> None:
    head, hidden, labels = make_batch()
    polluted = hidden.detach().clone()
    polluted[labels == IGNORE_INDEX] = torch.nan
    polluted.requires_grad_()
    loss, _ = labelled_loss(head, polluted, labels, chunk=4)
    torch.testing.assert_close(loss, labelled_loss(head, hidden, labels, chunk=4)[0], rtol=0, atol=0)
    loss.backward()
    assert polluted.grad is not None and not polluted.grad[labels == IGNORE_INDEX].any()


@pytest.mark.parametrize("wrong", [-1, -101, VOCAB, 60_000])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_label_outside_the_vocabulary_is_refused(wrong: int, chunk: int) -> None:
    head, hidden, labels = make_batch()
    labels[3, 8] = wrong
    with pytest.raises(DataError, match=f"label is {wrong}, outside of the {VOCAB} tokens"):
        labelled_loss(head, hidden, labels, chunk=chunk)


def test_labels_that_do_not_fit_are_refused() -> None:
    head, hidden, labels = make_batch()
    with pytest.raises(ShapeError, match=r"\[4, 8\], expected int64 \[4, 9\]"):
        labelled_loss(head, hidden, labels[:, 1:])
    with pytest.raises(ShapeError, match=r"int32 \[4, 9\], expected int64"):
        labelled_loss(head, hidden, labels.int())


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunk_without_positions_is_refused(chunk: int) -> None:
    with pytest.raises(ConfigError, match=f"chunk={chunk} must be at least 1"):
        labelled_loss(*make_batch(), chunk=chunk)
