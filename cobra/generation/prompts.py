"""Questions with images in the middle of the text."""

from __future__ import annotations

from typing import Any

from cobra.errors import ConfigError
from cobra.text.prompt import IMAGE_TAG, PromptFormat


class Prompt:
    """A question of text and images in any order: `Prompt("How does", Path("a.png"), "differ from", image, "?")`.

    Every image is read where it stands. Cobra is trained with one image before the text, and other orders are as good
    as a model's training makes them.

    Attributes:
        images: in their order.
        texts: around the images, one more than there are images; they may be empty.
    """

    def __init__(self, *pieces: Any) -> None:
        """Take the pieces: a string is text; an image is anything else that `Cobra.generate` takes, but no state.

        Raises:
            ConfigError: there are no pieces.
        """
        if not pieces:
            raise ConfigError("The prompt has no pieces; give it text and images.")
        self.images: list[Any] = []
        self.texts = [""]
        for piece in pieces:
            if isinstance(piece, str):
                self.texts[-1] += piece
            else:
                self.images.append(piece)
                self.texts.append("")

    def framed(self, frame: PromptFormat) -> list[str]:
        """Return the texts with what the model wants around a question, as `PromptFormat.question` does."""
        texts = [text.replace(IMAGE_TAG, "") for text in self.texts]
        texts[0] = frame.before + texts[0].lstrip()
        texts[-1] = texts[-1].rstrip() + frame.after
        return texts
