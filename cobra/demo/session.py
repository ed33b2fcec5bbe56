"""What the page computes for one visitor: answers of every kind, and how fast they came."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock

from PIL import Image

from cobra.api import Cobra, ImageState
from cobra.config import DemoPromptsConfig
from cobra.errors import CobraError, ConfigError
from cobra.eval.rules.boxes import BoxXYXY, parse_box
from cobra.generation.chat import Chat
from cobra.generation.options import GenerateOptions

MAX_QUESTION = 4000  # characters
WORDS = (("True", "False"), ("Yes", "No"))  # pairs to choose from, where they are single tokens


@dataclass
class Visit:
    """What one visitor's page shows: the image, as the model remembers it, and the conversation about it."""

    digest: str = ""  # of the image; no image has none
    image: ImageState | None = None
    chat: Chat | None = None


@dataclass
class Asker:
    """Asks the model for all visitors, one token at a time each, so that a long answer keeps nobody waiting."""

    vlm: Cobra
    prompts: DemoPromptsConfig
    max_new_tokens: int
    _lock: Lock = field(default_factory=Lock)

    def see(self, visit: Visit, image: Image.Image | None) -> Chat:
        """Return the conversation about the image that the page shows; another image begins another one."""
        digest = "" if image is None else hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if visit.chat is None or digest != visit.digest:
            with self._lock:
                visit.image = None if image is None else self.vlm.encode_image(image)
                visit.chat = self.vlm.chat(visit.image)
            visit.digest = digest
        return visit.chat

    def stream(
        self, visit: Visit, image: Image.Image | None, question: str, temperature: float, max_new_tokens: int
    ) -> Iterator[tuple[list[tuple[str, str]], str]]:
        """Yield the conversation as it grows, with how fast it does."""
        _check(question)
        chat = self.see(visit, image)
        start = time.perf_counter()
        with self._lock:
            stream = chat.stream(question, **self._options(temperature, max_new_tokens))
        past, answer = chat.history[:], ""
        yield [*past, (question.strip(), "")], ""
        while True:
            with self._lock:
                piece = next(stream, None)
            if piece is None:
                break
            answer += piece
            yield [*past, (question.strip(), answer)], speed(chat.num_answer_tokens, start)
        yield chat.history[:], speed(chat.num_answer_tokens, start)

    def short(
        self, visit: Visit, image: Image.Image | None, question: str, temperature: float, max_new_tokens: int
    ) -> tuple[str, str]:
        """Return the answer to a question for a word or two, and its speed."""
        return self._answer(visit, image, self.prompts.short, question, temperature, max_new_tokens)

    def judge(self, visit: Visit, image: Image.Image | None, statement: str, words: str) -> dict[str, float]:
        """Return the probability of each word of a pair such as "True / False"."""
        _check(statement)
        self.see(visit, image)
        choices = words.split(" / ")
        with self._lock:
            probabilities = self.vlm.score(visit.image, self.prompts.judge.replace("{question}", statement), choices)
        return dict(zip(choices, probabilities, strict=True))

    def find(
        self, visit: Visit, image: Image.Image | None, phrase: str, temperature: float, max_new_tokens: int
    ) -> tuple[BoxXYXY | None, str, str]:
        """Return the box that the model writes, None where it is none, what it wrote, and its speed.

        Raises:
            ConfigError: there is no image.
        """
        if image is None:
            raise ConfigError("There is no image to find something in; choose one first.")
        text, rate = self._answer(visit, image, self.prompts.box, phrase, temperature, max_new_tokens)
        return parse_box(text), text, rate

    def words(self) -> list[str]:
        """Return the pairs of words that this model's tokenizer has."""
        return [" / ".join(pair) for pair in WORDS if self._has(pair)]

    def _has(self, pair: Sequence[str]) -> bool:
        try:
            self.vlm.choice_ids(pair)
        except CobraError:
            return False
        return True

    def _answer(
        self,
        visit: Visit,
        image: Image.Image | None,
        prompt: str,
        question: str,
        temperature: float,
        max_new_tokens: int,
    ) -> tuple[str, str]:
        _check(question)
        self.see(visit, image)
        start = time.perf_counter()
        # A chat of one turn, as it counts tokens.
        chat = self.vlm.chat(visit.image)
        with self._lock:
            text = chat.ask(
                prompt.replace("{question}", question.strip()), **self._options(temperature, max_new_tokens)
            )
        return text, speed(chat.num_answer_tokens, start)

    def _options(self, temperature: float, max_new_tokens: int) -> GenerateOptions:
        # The page's own limits; a program may send anything.
        return GenerateOptions(temperature=temperature, max_new_tokens=min(int(max_new_tokens), self.max_new_tokens))


def speed(count: int, start: float) -> str:
    """Say how many tokens there are since `start`, by the clock of `time.perf_counter`."""
    seconds = time.perf_counter() - start
    return f"{count} token{'s' * (count != 1)} in {seconds:.1f} s, {count / seconds:.1f} tokens/s"


def _check(question: str) -> None:
    if not question.strip():
        raise ConfigError("Type something first.")
    if len(question) > MAX_QUESTION:
        raise ConfigError(f"This is {len(question)} characters long; {MAX_QUESTION} are the limit here.")
