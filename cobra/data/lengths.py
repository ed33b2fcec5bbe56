"""How long every row is in tokens, counted once per tokenizer, prompt format and limit."""

from __future__ import annotations

import hashlib

import numpy as np

from cobra.data.index import Index, array_found_or_made
from cobra.data.progress import progress
from cobra.text.counting import TokenCounter
from cobra.text.prompt import PromptFormat
from cobra.text.tokenizer import Tokenizer

_FORMAT = 1


def text_lengths(
    index: Index, name: str, tokenizer: Tokenizer, prompt: PromptFormat, *, max_length: int, captions_only: bool
) -> np.ndarray:
    """Return int32 [2, rows], memory-mapped: text tokens of each row, and how many of them are answers.

    Args:
        index: the rows.
        name: of the data set, for the progress bar.
        tokenizer, prompt: how the rows become text tokens.
        max_length: tokens behind it are cut off and do not count.
        captions_only: the align stage, which learns the first answer without its question.
    """
    key = hashlib.sha256(tokenizer.file.read_bytes())
    key.update(repr((_FORMAT, prompt, max_length, captions_only)).encode())
    file = index.folder / f"lengths-{key.hexdigest()[:16]}.npy"

    def make() -> np.ndarray:
        lengths = np.empty((2, len(index)), np.int32)
        count, done = TokenCounter(tokenizer).count, 0
        render = prompt.caption if captions_only else prompt.conversation
        with progress(len(index), f"lengths of {name}", "row") as bar:
            for rows in index.rows():
                for i, row in enumerate(rows, start=done):
                    length, labels = 0, 0
                    for segment in render(row.turns):
                        tokens = min(count(segment.text), max_length - length)
                        length += tokens
                        labels += tokens if segment.is_answer else 0
                    lengths[:, i] = length, labels
                done += len(rows)
                bar.update(len(rows))
        return lengths

    return array_found_or_made(index.folder, file, make)
