"""The shipped tokenizer, and the errors of unusable ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobra.errors import CheckpointError, ConfigError
from cobra.text.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_tiny_tokenizer.py"


@pytest.mark.parametrize("word", ["Yes", "No", "True", "False", "circle", "<|endoftext|>"])
def test_answers_are_single_tokens(tokenizer: Tokenizer, word: str) -> None:
    assert tokenizer.decode([tokenizer.single_id(word)]) == ("" if word == "<|endoftext|>" else word)


def test_script_writes_the_shipped_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "new.json"], check=True, capture_output=True)
    assert (tmp_path / "new.json").read_bytes() == tokenizer.file.read_bytes()


def test_vocabulary_fits_the_tiny_model(tokenizer: Tokenizer, tiny_config) -> None:
    assert len(tokenizer) == tiny_config().model.llm.vocab_size


@given(st.text())
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|endoftext|>", "")


def test_nothing_is_added_at_the_ends(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode("red<|endoftext|>") == [*tokenizer.encode("red"), tokenizer.end_id]


def test_choice_of_several_tokens_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"'Perhaps' is \d tokens"):
        tokenizer.single_id("Perhaps")


@pytest.mark.parametrize("text", ["", "{}", '{"model": '])
def test_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_tokenizer_without_an_end_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tokenizer.file.read_text().replace("<|endoftext|>", "<|end|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="which ends every answer"):
        Tokenizer(tmp_path / "tokenizer.json")
