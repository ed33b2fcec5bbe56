"""A chat in the terminal: streaming, commands, line editing. Without a terminal, one question a line."""

from __future__ import annotations

import glob
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cobra.api import Cobra
from cobra.config import GenerateConfig, nearest
from cobra.errors import CobraError, ConfigError
from cobra.generation.options import GenerateOptions

HELP = """\
/image PATH|URL   begin a new conversation about an image; without one: with no image
/reset            forget the conversation, keep the image
/save FILE        write the conversation to FILE.md or FILE.json
/help             this list
/quit             leave; so does Ctrl-D
Ctrl-C stops an answer; what was said of it stays in the conversation."""
COMMANDS = ("/help", "/image", "/quit", "/reset", "/save")
HISTORY_LENGTH = 1000
DIM, PLAIN = "\033[2m", "\033[0m"
# A model may write anything, and some of it would take control of the terminal.
NO_CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class TerminalChat:
    """Asks a model what a user types."""

    def __init__(self, vlm: Cobra, config: GenerateConfig) -> None:
        """Read the image.

        Raises:
            CobraError: the image is missing or does not decode, or an option is out of its range.
        """
        self._vlm = vlm
        self._options = GenerateOptions(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            seed=config.seed,
            stop=config.stop,
        )
        self._history = None if config.history is None else Path(config.history).expanduser()
        self._chat = vlm.chat(config.image, **self._options)
        self._has_keyboard = sys.stdin.isatty()
        self._has_screen = sys.stdout.isatty()
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    def run(self) -> int:
        """Answer until the input ends; return the exit code: 1 where a line of a file failed."""
        if self._has_keyboard:
            self._note(f"{self._vlm.name}: ask a question. /help lists the commands, Ctrl-D leaves.")
        failures = 0
        for line in self._lines():
            word, _, rest = line.partition(" ")
            if word == "/quit":
                break
            try:
                if word[0] == "/" and word[1:].isalpha():  # and no path
                    self._obey(word, rest.strip())
                else:
                    self.answer(line)
            except CobraError as error:
                failures += 1
                self._note(f"error: {error}")
        return 1 if failures and not self._has_keyboard else 0

    def answer(self, question: str) -> None:
        """Print the answer while it is made; Ctrl-C stops it.

        Raises:
            CobraError: the question is empty, or the model is broken.
        """
        start = time.perf_counter()
        stream = self._chat.stream(question)
        try:
            for piece in stream:
                self._write(piece)
        except KeyboardInterrupt:
            if not self._has_keyboard:
                raise
            stream.close()
            self._write("\n")
            self._note("(stopped)")
            return
        self._write("\n")
        if self._has_screen:
            count, seconds = self._chat.num_answer_tokens, time.perf_counter() - start
            self._note(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s]")

    def _obey(self, command: str, argument: str) -> None:
        if command == "/help":
            self._note(HELP)
        elif command == "/image":
            self._chat = self._vlm.chat(_as_path(argument) if argument else None, **self._options)
            self._note("A new conversation about this image." if argument else "A new conversation without an image.")
        elif command == "/reset":
            self._chat.reset()
            self._note("The conversation is forgotten.")
        elif command == "/save":
            if not argument:
                raise ConfigError("/save needs the name of a file, such as /save chat.md.")
            self._note(f"Written: {self._chat.save(_as_path(argument))}")
        else:
            raise ConfigError(f"There is no command {command}.{nearest(command, COMMANDS)} /help lists them.")

    def _lines(self) -> Iterator[str]:
        """Yield what is typed, without blank lines."""
        lines = self._typed_lines() if self._has_keyboard else sys.stdin
        for line in lines:
            if line.strip():
                yield line.strip()

    def _typed_lines(self) -> Iterator[str]:
        with _line_editing(self._history):
            while True:
                try:
                    yield input("> " if self._has_screen else "")
                except EOFError:
                    self._write("\n")
                    return
                except KeyboardInterrupt:  # as in a shell: the line is dropped
                    self._write("\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text.translate(NO_CONTROL) if self._has_screen else text)
        sys.stdout.flush()

    def _note(self, text: str) -> None:
        """Say something that is no part of an answer."""
        # Also the words of a server that an image was asked of.
        sys.stderr.write(f"{DIM}{text.translate(NO_CONTROL)}{PLAIN}\n" if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()


def _as_path(argument: str) -> str:
    """Undo the quotes and backslashes of a path that was dragged into the terminal."""
    if argument[0] == argument[-1] and argument[0] in "'\"" and len(argument) > 1:
        return argument[1:-1]
    return argument.replace("\\ ", " ")


@contextmanager
def _line_editing(history: Path | None) -> Iterator[None]:
    """Edit lines with the arrow keys, complete commands and paths, and remember lines in a file."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    readline.set_completer_delims(" ")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(HISTORY_LENGTH)
    if history is None:
        yield
        return
    with suppress(OSError):  # none yet
        readline.read_history_file(history)
    try:
        yield
    finally:
        with suppress(OSError):  # a home that cannot be written is no reason to fail
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def _complete(text: str, number: int) -> str | None:
    """Return the so-manieth command or path that begins with `text`, as readline asks for them."""
    folder, slash, start = text.rpartition("/")
    inside = sorted(Path(folder + slash).expanduser().glob(f"{glob.escape(start)}*"))
    paths = [f"{folder}{slash}{item.name}{'/' if item.is_dir() else ''}" for item in inside]
    found = [*(command for command in COMMANDS if command.startswith(text)), *paths]
    return found[number] if number < len(found) else None
