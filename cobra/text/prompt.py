"""Chat formats: turns of a conversation -> segments of text, each marked as learnt or not.

The strings are those that the public Cobra weights were trained with. Training tokenises segment by segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cobra.config import QUESTION_SLOT
from cobra.errors import ConfigError
from cobra.text.tokenizer import END_OF_TEXT

IMAGE_TAG = "<image>"
IGNORE_INDEX = -100  # label of a position that carries no loss; what torch's cross-entropy ignores


@dataclass(frozen=True)
class Segment:
    """A piece of text; `is_answer` pieces carry the loss."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class PromptFormat:
    """How a user's message is wrapped: `before` + message + `after`, with `between` ahead of every later turn."""

    before: str
    after: str
    between: str = "\n"

    def question(self, message: str, *, is_first: bool = True) -> str:
        """Wrap a user's message; the answer follows directly. `<image>` tags are dropped, the message is stripped."""
        message = message.replace(IMAGE_TAG, "").strip()
        return f"{'' if is_first else self.between}{self.before}{message}{self.after}"

    def answer(self, message: str) -> str:
        """End an answer; an empty one becomes a single space."""
        message = message.replace(IMAGE_TAG, "").strip()
        return f"{message or ' '}{END_OF_TEXT}"

    def conversation(self, turns: Sequence[tuple[str, str]]) -> list[Segment]:
        """Render (question, answer) turns."""
        segments: list[Segment] = []
        for i, (question, answer) in enumerate(turns):
            segments.append(Segment(self.question(question, is_first=i == 0), is_answer=False))
            segments.append(Segment(self.answer(answer), is_answer=True))
        return segments

    def caption(self, turns: Sequence[tuple[str, str]]) -> list[Segment]:
        """Render the first answer alone, as the align stage learns it: no human turn."""
        return [Segment(self.answer(turns[0][1]), is_answer=True)]


_FORMATS = {
    "zephyr": PromptFormat(before="<|user|>\n", after=f"{END_OF_TEXT}\n<|assistant|>\n"),
    "mamba": PromptFormat(before="In: ", after="\nOut: "),
}


def prompt_format(name: str) -> PromptFormat:
    """Return the format called `name`: `zephyr` (chat models), `mamba` (base models), or the one it is a template of.

    A template has `{question}` where the message stands; the answer follows at its end.
    """
    if QUESTION_SLOT in name:
        before, _, after = name.partition(QUESTION_SLOT)
        return PromptFormat(before=before, after=after)
    if name not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ConfigError(f"Unknown prompt format {name!r}; known: {known}, or a text that holds {QUESTION_SLOT}.")
    return _FORMATS[name]
