"""Counting tokens equals encoding, for any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobra.text.counting import TokenCounter
from cobra.text.tokenizer import Tokenizer

untimed = settings(deadline=None)  # others may have the cores

WHITE = [" ", " ", " ", "  ", "\n", "\n ", "\t", "\u00a0", "\u2000", "\u3000", "\x1c", "\x85"]
OTHER = ["a", "word", "'s", "'", ".", ",", "7", "_", "\u00e9", "e\u0301", "\u0301", "\u00bd", "\ud55c", "\u1112\u1161"]
pieces = st.sampled_from([*WHITE, *OTHER, "<|endoftext|>", "<|", "\U0001f600"])
texts = st.one_of(st.text(max_size=20), st.lists(pieces, max_size=12).map("".join))


@untimed
@given(text=texts)
def test_count_equals_encode(tokenizer: Tokenizer, text: str) -> None:
    assert TokenCounter(tokenizer).count(text) == len(tokenizer.encode(text))


@pytest.fixture(scope="session")
def neox(assets: Path) -> tuple[Tokenizer, TokenCounter]:
    tokenizer = Tokenizer(assets / "data" / "gpt-neox-tokenizer" / "tokenizer.json")
    return tokenizer, TokenCounter(tokenizer)


@untimed
@given(text=texts)
def test_count_equals_encode_of_gpt_neox(neox: tuple[Tokenizer, TokenCounter], text: str) -> None:
    tokenizer, counter = neox
    assert counter.count(text) == len(tokenizer.encode(text))


def test_tokenizer_of_another_kind_is_asked_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(tokenizer.file.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    other = Tokenizer(tmp_path / "tokenizer.json")
    for text in ("a b", "shape", ""):
        assert TokenCounter(other).count(text) == len(other.encode(text))
