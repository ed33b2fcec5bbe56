"""Mamba against itself: steps, chunks, padded and packed rows all give what one full scan gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cobra.errors import ShapeError
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState

from .mamba_cases import ROUNDING, assert_states_equal, decode, logits_of, make_config, make_lm, random_ids


@torch.no_grad()
def test_step_by_step_equals_full_scan() -> None:
    lm, ids = make_lm(), random_ids(3, 21)
    full, state = logits_of(lm, ids)
    first, carried = logits_of(lm, ids[:, :1])
    rest, carried = decode(lm, ids[:, 1:], carried)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), full, rtol=0, atol=ROUNDING)
    assert_states_equal(carried, state)


@pytest.mark.parametrize("cuts", [(1, 2), (2, 9), (3, 4), (16, 20)])
@torch.no_grad()
def test_chunked_prefill_equals_one(cuts: tuple[int, int]) -> None:
    lm, ids = make_lm(), random_ids(2, 21)
    full, expected = logits_of(lm, ids)
    pieces, state = [], None
    for chunk in ids.tensor_split(cuts, dim=1):
        logits, state = logits_of(lm, chunk, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=ROUNDING)
    assert state is not None
    assert_states_equal(state, expected)


@pytest.mark.parametrize("has_prefix", [False, True])
@torch.no_grad()
def test_padded_rows_equal_each_row_alone(has_prefix: bool) -> None:
    lm, ids, lengths = make_lm(), random_ids(5, 11), torch.tensor([1, 2, 11, 3, 7])
    before = logits_of(lm, random_ids(5, 6))[1] if has_prefix else None
    embeddings = lm.embed(ids)
    for row, length in enumerate(lengths):
        embeddings[row, length:] = math.nan  # padding may be anything
    hidden, state = lm(embeddings, state=before, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, after = lm(lm.embed(ids[[row], :length]), state=None if before is None else before[[row]])
        torch.testing.assert_close(hidden[row, :length], alone[0], rtol=0, atol=ROUNDING)
        assert_states_equal(state[[row]], after)


class TestPackedRows:
    """Several texts in one row, kept apart by `resets`."""

    TEXTS = ([5, 1, 9], [8, 5, 2])  # tokens of each text, per row; one is shorter than the convolution is wide

    def packed(self, lm: MambaLM, state: MambaState | None) -> tuple[Tensor, MambaState]:
        resets = torch.zeros(2, 15, dtype=torch.bool)
        for row, texts in enumerate(self.TEXTS):
            resets[row, [texts[0], texts[0] + texts[1]]] = True
        return lm(lm.embed(random_ids(2, 15)), state=state, resets=resets)

    def alone(self, lm: MambaLM, state: MambaState | None) -> tuple[Tensor, MambaState]:
        rows, ends = [], []
        for row, (ids, texts) in enumerate(zip(random_ids(2, 15), self.TEXTS, strict=True)):
            before, pieces, after = None if state is None else state[[row]], [], None
            for text in ids.split(texts):
                hidden, after = lm(lm.embed(text[None]), state=before)
                before = None  # the state belongs to the first text
                pieces.append(hidden)
            assert after is not None
            rows.append(torch.cat(pieces, dim=1))
            ends.append(after)
        return torch.cat(rows), MambaState.concat(ends)

    @pytest.mark.parametrize("every", [None, 1], ids=["kept", "recomputed"])
    @pytest.mark.parametrize("has_prefix", [False, True])
    def test_packed_texts_equal_each_text_alone(self, has_prefix: bool, every: int | None) -> None:
        lm = make_lm()
        lm.checkpoint_activations(every)
        weight = torch.randn(2, 15, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found = []
        for run in (self.packed, self.alone):
            prefix = logits_of(lm, random_ids(2, 6))[1] if has_prefix else None
            hidden, state = run(lm, prefix)
            loss = (hidden * weight).sum() + sum(t.sum() for t in (*state.conv, *state.ssm))
            found.append((hidden, state, torch.autograd.grad(loss, list(lm.backbone.parameters()))))
        (hidden, state, gradients), (expected, expected_state, expected_gradients) = found
        torch.testing.assert_close(hidden, expected, rtol=0, atol=ROUNDING)
        assert_states_equal(state, expected_state)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))

    @torch.no_grad()
    def test_reset_at_the_first_token_forgets_the_prefix(self) -> None:
        lm, ids = make_lm(), random_ids(2, 7)
        _, prefix = logits_of(lm, random_ids(2, 6))
        resets = torch.zeros(2, 7, dtype=torch.bool)
        resets[1, 0] = True
        hidden, _ = lm(lm.embed(ids), state=prefix, resets=resets)
        torch.testing.assert_close(hidden[0], lm(lm.embed(ids), state=prefix)[0][0], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(hidden[1], lm(lm.embed(ids))[0][1], rtol=0, atol=ROUNDING)

    def test_resets_that_do_not_fit_are_refused(self) -> None:
        lm = make_lm()
        with pytest.raises(ShapeError, match="resets"):
            lm(lm.embed(random_ids(2, 4)), resets=torch.zeros(2, 3, dtype=torch.bool))


def test_init_weights_depend_on_the_generator_only() -> None:
    first, again, other = (MambaLM(make_config()) for _ in range(3))
    for lm, seed in ((first, 3), (again, 3), (other, 4)):
        lm.init_weights(torch.Generator().manual_seed(seed))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.backbone.embedding.weight, other.backbone.embedding.weight)


def test_inputs_of_the_wrong_kind_are_refused() -> None:
    lm = make_lm()
    for embeddings in (torch.zeros(2, 4, 31), torch.zeros(4, 32), torch.zeros(2, 4, 32, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"embeddings are .*expected floating point \[batch, length, 32\]"):
            lm(embeddings)
    with pytest.raises(ShapeError, match=r"input_ids are torch.float32 \[2, 4\], expected int64 \[batch, length\]"):
        lm.embed(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"\[4\], expected int64 \[batch, length\]"):
        lm.embed(torch.zeros(4, dtype=torch.int64))
    _, state = logits_of(lm, random_ids(2, 4))
    with pytest.raises(ShapeError, match=r"\[2, 1\], expected int64 \[batch\]"):
        lm.step(random_ids(2, 1), state)
