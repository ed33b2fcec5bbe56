"""`scripts/generate.py`: one answer, a file of questions, and a chat in a real terminal."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cobra
from cobra.models.vlm import CobraVLM
from cobra.models.weights import save_model_folder
from cobra.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "what shape, in 'this' {image}?"
RANDOM = {"temperature": 8.0, "seed": 3, "max_new_tokens": 7}  # bytes of any kind, so every answer is another one
OPTIONS = [f"{key}={value}" for key, value in RANDOM.items()]


@pytest.fixture
def folder(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model of random weights: it talks nonsense, and does not stop."""
    save_model_folder(small_model, tokenizer.file, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def image(small_data, tmp_path: Path) -> Path:
    """One with a space in its name."""
    return Path(shutil.copy(small_data.image(0), tmp_path / "an image.png"))


def ask_file(command: list[str], lines: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True, timeout=300)


def test_one_answer_to_a_question_as_it_is_typed(
    script: Callable[..., subprocess.CompletedProcess[str]], folder: Path, image: Path
) -> None:
    result = script("generate", f"model={folder}", f"image={image}", f"prompt={QUESTION}", *OPTIONS)
    expected = cobra.load(folder, device="cpu").generate(image, QUESTION, **RANDOM)
    assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr


def test_a_file_of_questions_is_answered_line_by_line(
    command: Callable[..., list[str]], folder: Path, image: Path, tmp_path: Path
) -> None:
    chat = cobra.load(folder, device="cpu").chat(image, **RANDOM)
    expected = [chat.ask(QUESTION), chat.ask("and now?")]
    chat.reset()
    expected.append(chat.ask("/dev/null is a path"))
    lines = [QUESTION, "", "/image absent.png", "and now?", "/save a.json", "/reset", "/dev/null is a path", "/rest"]
    start = command("generate", f"model={folder}", f"image={image}", *OPTIONS)
    result = ask_file(start, "\n".join(lines), tmp_path)
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)
    notes = result.stderr.splitlines()
    assert [note for note in notes if note.startswith("error:")] == [
        "error: Cannot read the image absent.png: No such file or directory.",
        "error: There is no command /rest. Did you mean '/reset'? /help lists them.",
    ]
    assert result.returncode == 1  # as something went wrong, and nobody was there to see it
    values = [message["value"] for message in json.loads((tmp_path / "a.json").read_text())[0]["conversations"]]
    assert values == [f"<image>\n{QUESTION}", expected[0], "and now?", expected[1]]


class Terminal:
    """A process in a terminal of its own, and what it has shown so far."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.keyboard, screen = os.openpty()
        # The first terminal that the leader of a session opens controls it: Ctrl-C becomes a signal.
        open_terminal = "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", open_terminal, *command],
            cwd=folder,
            env=os.environ | {"HOME": str(folder), "TERM": "xterm"},
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            # Whoever started the tests in the background may ignore Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(screen)
        self.screen = ""

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def look(self) -> None:
        """Wait a little for something new."""
        if select.select([self.keyboard], [], [], 1)[0]:
            self.screen += os.read(self.keyboard, 2**16).decode(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Return what is shown from here up to the text."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < end, f"{text!r} is not in {self.screen!r}"
            self.look()
        shown, _, self.screen = self.screen.partition(text)
        return shown


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[list[str]], Terminal]]:
    if not hasattr(os, "openpty"):
        pytest.skip("terminals are a Unix thing")
    terminals: list[Terminal] = []

    def start(command: list[str]) -> Terminal:
        terminals.append(Terminal(command, tmp_path))
        return terminals[-1]

    yield start
    for one in terminals:
        one.process.kill()
        one.process.wait()
        os.close(one.keyboard)


def test_chat_in_a_terminal(
    terminal: Callable[[list[str]], Terminal],
    command: Callable[..., list[str]],
    folder: Path,
    image: Path,
    tmp_path: Path,
) -> None:
    chat = terminal(command("generate", f"model={folder}", *OPTIONS))
    chat.wait_for("/help lists the commands")
    chat.wait_for("> ")
    chat.type("what?\r")
    chat.wait_for("[7 tokens in ")
    chat.wait_for("tokens/s]")
    chat.wait_for("> ")
    chat.type("/image absent.png\r")
    chat.wait_for("error: Cannot read the image absent.png")
    chat.wait_for("> ")
    chat.type("/image an\t\r")  # completes the name
    chat.wait_for("A new conversation about this image.")
    chat.wait_for("> ")
    chat.type("\x1b[A\x1b[A\x1b[A and how\r")  # three lines up
    chat.wait_for("[7 tokens in ")
    chat.wait_for("> ")
    chat.type("half a line")
    chat.wait_for("half a line")
    chat.look()  # readline does not see a Ctrl-C that comes while it draws the prompt
    chat.type("\x03")
    chat.wait_for("> ")
    chat.type("/help\r")
    chat.wait_for("/save FILE")
    chat.wait_for("> ")
    chat.type("/save a.md\r")
    chat.wait_for("Written: a.md")
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
    expected = cobra.load(folder, device="cpu").generate(image, "what? and how", **RANDOM)
    assert (tmp_path / "a.md").read_text() == f"# Chat\n\nImage: an image.png\n\n**what? and how**\n\n{expected}\n"
    remembered = (tmp_path / ".cache" / "cobra" / "chat-history").read_text().splitlines()
    assert remembered[0] == "what?" and "what? and how" in remembered


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    terminal: Callable[[list[str]], Terminal], command: Callable[..., list[str]], folder: Path, tmp_path: Path
) -> None:
    chat = terminal(command("generate", f"model={folder}", "max_new_tokens=1000000", "history=null", "temperature=8"))
    for question in ("what?", "and?"):
        chat.wait_for("> ")
        chat.type(f"{question}\r")
        chat.wait_for(f"{question}\r\n")
        while len(chat.screen) < 30:  # it talks
            chat.look()
        chat.type("\x03")
        chat.wait_for("(stopped)")
    chat.wait_for("> ")
    chat.type("/save a.json\r")
    chat.wait_for("Written")
    chat.type("/quit\r")
    assert chat.process.wait(60) == 0
    messages = json.loads((tmp_path / "a.json").read_text())[0]["conversations"]
    assert [message["value"] for message in messages[::2]] == ["what?", "and?"]
    assert all(len(message["value"]) > 20 for message in messages[1::2])
    assert not (tmp_path / ".cache").exists()


def test_answers_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import _terminal

    assert "a\x1b[31m\r\x9b\n\tü\x7f".translate(_terminal.NO_CONTROL) == "a\ufffd[31m\ufffd\ufffd\n\tü\ufffd"
    assert sys.modules.pop("_terminal")
