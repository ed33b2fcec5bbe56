"""A conversation whose turns cost the same however long it has become: its state stays between the turns."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cobra.errors import ConfigError, DataError
from cobra.generation.engine import decode, prefill
from cobra.generation.sampling import Sampling, SamplingOptions
from cobra.generation.stopping import AnswerText, stop_strings
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.runtime import write_text
from cobra.text.prompt import IMAGE_TAG, PromptFormat
from cobra.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cobra.generation.options import GenerateOptions


class Chat:
    """Questions and answers, each of which knows all that came before; one thread at a time.

    What the model has read is at every moment the conversation as `PromptFormat.conversation` renders it, in the tokens
    that the model itself wrote. Nothing is read twice but what an interruption leaves; nothing grows but `history`.

    Attributes:
        history: (question, answer) of each turn.
        num_answer_tokens: tokens of the latest answer, growing while it is streamed.
    """

    def __init__(
        self,
        llm: MambaLM,
        tokenizer: Tokenizer,
        prompt: PromptFormat,
        prefix: MambaState | None,
        *,
        source: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> None:
        """Begin a conversation; `Cobra.chat` does it for users.

        Args:
            llm, tokenizer, prompt: of the model.
            prefix: the image's state, one row; None: text alone.
            source: where the image came from, for transcripts.
            options: of every turn that does not bring its own.
        """
        self.history: list[tuple[str, str]] = []
        self.num_answer_tokens = 0
        self._llm = llm
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._prefix = prefix
        self._source = source
        self._options = options
        _checked(**options)
        # The conversation is `_state` and then `_unread`: an answer that ends by itself leaves its end token there.
        self._state = prefix
        self._unread: list[int] = []
        self._open: Generator[str, None, None] | None = None

    @property
    @torch.inference_mode()
    def state(self) -> MambaState | None:
        """The state after the image and all turns, each answer's end token included; None before the first text."""
        if self._unread:
            _, self._state = prefill(self._llm, [self._unread], self._state)
            self._unread = []
        return self._state

    def ask(self, text: str, **options: Unpack[GenerateOptions]) -> str:
        """Answer a question; arguments and errors as in `stream`."""
        return "".join(self.stream(text, **options))

    def stream(self, text: str, **options: Unpack[GenerateOptions]) -> Generator[str, None, None]:
        """Yield the answer to a question piece by piece; they join to what `history` will hold.

        A turn enters the conversation when its answer ends. A stream that is closed, collected or interrupted by Ctrl-C
        is an answer that ends there: what was yielded is the answer, and the model remembers the tokens behind it; a
        turn of which nothing was yielded has never been, nor has one that ends in another error. A new question, and
        `reset`, close a stream that is still open.

        Args:
            text: the question.
            options: as of `Cobra.generate`; they replace the chat's own in this turn. The chat's seed is that of its
                first turn, and grows by one with every turn. A repetition penalty looks at the turn's own question and
                answer: counting what came before would make every later word less likely, and stop words first.

        Raises:
            ConfigError: at once, an empty question, or an option out of its range.
            NumericsError: when iterated, the model's output is NaN or infinite.
        """
        self._close()
        if not isinstance(text, str) or not text.replace(IMAGE_TAG, "").strip():
            raise ConfigError(f"The question {text!r} is empty; a turn of a chat needs some text.")
        seed = self._options.get("seed", 0)
        assert isinstance(seed, int)  # checked when the chat began
        limit, stops, sampling = _checked(**{**self._options, "seed": seed + len(self.history), **options})
        question = self._tokenizer.encode(self._prompt.question(text, is_first=not self.history))
        answer = AnswerText(self._tokenizer.decode, stops)
        tokens: list[int] = []
        final: list[MambaState] = []  # the state after the question and all tokens, if the answer ends by itself

        def is_over(_row: int, token: int) -> bool:
            tokens.append(token)
            self.num_answer_tokens = len(tokens)
            answer.add(token)
            return answer.is_over

        with torch.inference_mode():
            steps = decode(
                self._llm,
                [question],
                self.state,
                max_new_tokens=limit,
                end_id=self._tokenizer.end_id,
                sampling=sampling,
                is_over=is_over,
                on_end=lambda _row, state: final.append(state),
            )
        self.num_answer_tokens = 0
        self._open = self._turn(text.strip(), question, steps, answer, tokens, final)
        return self._open

    def reset(self) -> None:
        """Forget all turns; the image stays."""
        self._close()
        self.history = []
        self._state, self._unread = self._prefix, []

    def save(self, path: str | Path) -> Path:
        """Write a transcript: `.md` to read, or `.json`, a row in the format of LLaVA's training data.

        Raises:
            ConfigError: another ending.
            DataError: the file cannot be written.
        """
        path = Path(path).expanduser()
        writers = {".json": self._as_json, ".md": self._as_markdown}
        if path.suffix not in writers:
            raise ConfigError(f"{path} must end in .md (to read) or .json (for programs) to say what to write.")
        try:
            write_text(path, writers[path.suffix]())
        except OSError as error:
            raise DataError(f"Cannot write the transcript {path}: {error.strerror}. Name another file.") from None
        return path

    def _turn(
        self,
        text: str,
        question: list[int],
        steps: Iterator[object],
        answer: AnswerText,
        tokens: list[int],
        final: list[MambaState],
    ) -> Generator[str, None, None]:
        pieces: list[str] = []

        def keep(state: MambaState | None, unread: list[int]) -> None:
            # Read when it is needed: this may run where the stream is collected, which is no place to compute.
            self._state, self._unread = state, unread
            self.history.append((text, "".join(pieces)))

        end = [self._tokenizer.end_id]
        try:
            is_last = False
            while not is_last:
                with torch.inference_mode():  # not across a yield: the caller's code runs there
                    is_last = next(steps, None) is None
                piece = answer.finish() if is_last else answer.take()
                if piece:
                    pieces.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if pieces:
                keep(self._state, [*question, *tokens, *end])
            raise
        # An answer without a token is read as training renders it.
        keep(final[0], end if tokens else self._tokenizer.encode(self._prompt.answer("")))

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _as_json(self) -> str:
        messages: list[dict[str, str]] = []
        for i, (question, answer) in enumerate(self.history):
            tag = f"{IMAGE_TAG}\n" if i == 0 and self._prefix is not None else ""
            messages += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
        row: dict[str, Any] = {"id": "chat", "conversations": messages}
        if self._source is not None:
            row["image"] = self._source
        return json.dumps([row], indent=2, ensure_ascii=False) + "\n"

    def _as_markdown(self) -> str:
        image = [f"Image: {self._source}"] if self._source is not None else []
        turns = [f"**{question}**\n\n{answer}" for question, answer in self.history]
        return "\n\n".join(["# Chat", *image, *turns]) + "\n"


def _checked(
    *, max_new_tokens: int = 128, stop: str | Sequence[str] = (), **sampling: Unpack[SamplingOptions]
) -> tuple[int, tuple[str, ...], Sampling]:
    """Return the options of one answer.

    Raises:
        ConfigError: one is out of its range.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r} must be a whole number, at least 1.")
    if not isinstance(sampling.get("seed", 0), int):
        raise ConfigError(f"seed={sampling.get('seed')!r} must be one whole number in a chat, which grows by the turn.")
    return max_new_tokens, stop_strings(stop), Sampling(**sampling)
