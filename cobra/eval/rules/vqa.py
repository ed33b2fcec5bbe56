"""Accuracy against ten human answers: VQA-v2 (two rules), VizWiz, TextVQA.

An answer is right to the degree that people agree with it: min(matches / 3, 1), averaged over the sets of answers that
leave out one of them. Sums run in the order of the answers, so that scores are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

from cobra.eval.rules.words import VIZWIZ_CONTRACTIONS, flatten, rewrite_words, strip_punctuation

_CACHED = 2**17  # distinct texts that are kept; people repeat themselves


def leave_one_out(answer: str, truths: Sequence[str], entries: Sequence[Hashable] | None = None) -> float:
    """Return the accuracy of `answer` from 0 to 1.

    Args:
        answer: normalised, as are the `truths`.
        truths: what people said.
        entries: where given, leaving out an entry leaves out all that are equal to it, text included.
    """
    matches = [truth == answer for truth in truths]
    total = sum(matches)
    if not total:
        return 0.0
    if entries is None:
        return sum(min(1.0, (total - match) / 3) for match in matches) / len(truths)
    whole = list(zip(truths, entries, strict=True))
    return sum(
        min(1.0, (total - match * whole.count(one)) / 3) for match, one in zip(matches, whole, strict=True)
    ) / len(truths)


@lru_cache(_CACHED)
def _vqa_words(text: str) -> str:
    return rewrite_words(strip_punctuation(text))


_flatten = lru_cache(_CACHED)(flatten)
_strip_punctuation = lru_cache(_CACHED)(strip_punctuation)


def vqav2_official(answer: str, truths: Sequence[str], entries: Sequence[Hashable] | None = None) -> float:
    """Score as vqaEval.py of GT-Vision-Lab/VQA does: nothing is normalised where all ten people said the same."""
    answer, truths = _flatten(answer), [_flatten(truth) for truth in truths]
    if len(set(truths)) > 1:
        answer, truths = _vqa_words(answer), [_vqa_words(truth) for truth in truths]
    return leave_one_out(answer, truths, entries)


def vqav2_paper(answer: str, truths: Sequence[str], entries: Sequence[Hashable] | None = None) -> float:
    """Score as the paper's harness does: the answer fully normalised, the truths freed of punctuation only."""
    return leave_one_out(_vqa_words(_flatten(answer)), [_strip_punctuation(truth) for truth in truths], entries)


@lru_cache(_CACHED)
def vizwiz_words(text: str) -> str:
    """Normalise a predicted answer as VizWiz does."""
    return rewrite_words(strip_punctuation(flatten(text)), VIZWIZ_CONTRACTIONS)


def vizwiz(answer: str, truths: Sequence[str]) -> float:
    """Score as VizWiz's script does: the answer normalised, the truths as they are."""
    return leave_one_out(vizwiz_words(answer), truths)


@lru_cache(_CACHED)
def textvqa_words(text: str) -> str:
    """Normalise as the M4C processor does: `,` and `?` vanish before anything else, and `'s` becomes a word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _vqa_words(flatten(text.strip()))


def textvqa(answer: str, truths: Sequence[str]) -> float:
    """Score as M4C does: both sides normalised."""
    return leave_one_out(textvqa_words(answer), [textvqa_words(truth) for truth in truths])
