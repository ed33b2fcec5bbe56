"""Text <-> token ids: a byte-level BPE of the GPT-NeoX kind, read from a `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from cobra.errors import CheckpointError, ConfigError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Encodes and decodes text; `end_id` ends every answer and also pads (padding is never looked at)."""

    def __init__(self, file: Path) -> None:
        """Read a `tokenizer.json`.

        Raises:
            CheckpointError: the file is not a tokenizer, or lacks the `<|endoftext|>` token.
        """
        self.file = file
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is not a tokenizer.json: {error}") from None
        end_id = self._backend.token_to_id(END_OF_TEXT)
        if end_id is None:
            raise CheckpointError(f"{file} has no {END_OF_TEXT} token, which ends every answer.")
        self.end_id: int = end_id

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added at either end.

        Raises:
            ConfigError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"The text {text!r} holds {text[error.start]!r} at {error.start}, which is no character."
            ) from None
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; the end token and padding vanish."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def single_id(self, word: str) -> int:
        """Id of a word that must be one token.

        Raises:
            ConfigError: the vocabulary splits it.
        """
        ids = self.encode(word)
        if len(ids) != 1:
            raise ConfigError(
                f"The answer choice {word!r} is {len(ids)} tokens in {self.file.name}; choices must be single tokens."
            )
        return ids[0]
