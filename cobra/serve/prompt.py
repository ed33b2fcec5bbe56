"""Messages -> what the model reads: token ids and images in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cobra.serve.errors import refuse
from cobra.serve.schema import Message, TextPart
from cobra.text.prompt import PromptFormat


@dataclass
class Turn:
    """A question with its images, and the answer to it unless it is the last one."""

    texts: list[str] = field(default_factory=list[str])
    images: list[str] = field(default_factory=list[str])
    answer: str | None = None
    is_asked: bool = False  # there is a message of the user's


@dataclass(frozen=True)
class ImageSource:
    """An image that is still to be read.

    Attributes:
        url: where it is, or itself as a `data:` URL.
    """

    url: str


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Group messages into turns.

    The model knows no system messages: their text stands before the question that follows. Several messages of the
    user's in a row are one question, on lines of their own.

    Raises:
        ApiError: an answer without a question, nothing to answer at the end, or an image that is not the user's.
    """
    turns = [Turn()]
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        if message.content is None and message.role != "assistant":
            raise refuse("Only messages of the role 'assistant' may lack content.", f"{param}.content", "invalid_value")
        parts = message.content or []
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        images = [part.image_url.url for part in parts if not isinstance(part, TextPart)]
        if images and message.role != "user":
            raise refuse("Only messages of the role 'user' may hold images.", f"{param}.content")
        if message.role == "assistant":
            if not turns[-1].is_asked:
                raise refuse("A message of the role 'assistant' must follow one of the role 'user'.", param)
            turns[-1].answer = text
            turns.append(Turn())
            continue
        if message.role == "user":
            if not text.strip() and not images:
                raise refuse("The message is empty; ask something, or show an image.", f"{param}.content")
            turns[-1].is_asked = True
            turns[-1].images += images
        turns[-1].texts.append(text)
    if not turns[-1].is_asked:
        raise refuse("The last message must be of the role 'user'; there is nothing to answer.", "messages")
    return turns


def render(turns: Sequence[Turn], form: PromptFormat) -> list[str | ImageSource]:
    """Return the pieces that the model reads, texts as segments in its prompt format.

    A turn's images stand before its text: so does the image of the first turn in training, where there are no others.
    """
    pieces: list[str | ImageSource] = []
    for number, turn in enumerate(turns):
        pieces += [ImageSource(url) for url in turn.images]
        pieces.append(form.question("\n".join(turn.texts), is_first=number == 0))
        if turn.answer is not None:
            pieces.append(form.answer(turn.answer))
    return pieces
