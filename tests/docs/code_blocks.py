"""The code blocks of the documentation, and the commands that a shell would find in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

SHELL_WORDS = {"until", "while", "if", "then", "do", "else", "!", "done", "fi"}
VARIABLES = {"SLURM_NNODES": "2"}  # that a scheduler sets


@dataclass(frozen=True)
class Block:
    """A block of code; `str` of it names file and line, as editors and terminals open them."""

    page: str  # below the root
    line: int  # of its first line of code
    language: str  # "": none; "indented": no fence either
    text: str
    needs: str | None  # what a CPU without network does not have

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """What a shell would start: program and arguments, without comments, redirections and variables."""

    block: Block
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.block.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return all code blocks of a page, in order."""
    found, before = [], None
    name = page.relative_to(ROOT).as_posix()
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block") and token.map is not None:
            is_fence = token.type == "fence"
            language = token.info.strip() if is_fence else "indented"
            marker = before.content if before is not None and before.type == "html_block" else ""
            needs = re.fullmatch(r"<!-- needs: (.*) -->\s*", marker)
            line = token.map[0] + 1 + is_fence
            found.append(Block(name, line, language, token.content, needs[1] if needs else None))
        before = token
    return found


def commands(block: Block) -> Iterator[Command]:
    """Yield what a bash block starts, line by line; continued lines are one."""
    number, joined = block.line, ""
    for offset, line in enumerate(block.text.splitlines()):
        number = number if joined else block.line + offset
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        for words in simple_commands(joined):
            yield Command(block, number, words)
        joined = ""


def commands_in_sentences(page: Path) -> Iterator[Command]:
    """Yield what sentences and tables of a page name in full: with arguments, and nothing left for the reader."""
    name = page.relative_to(ROOT).as_posix()
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for part in token.children or []:
            words = tuple(part.content.split())
            # `cobra convert` and `python scripts/convert.py` are names.
            is_full = len(words) > 2 or words[1:] == ("--help",)
            if part.type == "code_inline" and is_full and not re.search(r"\.\.\.|NAME|<", part.content):
                line = token.map[0] + 1 if token.map is not None else 0
                if script(words) is not None:
                    yield Command(Block(name, line, "bash", part.content, None), line, words)


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """Split what `;`, `&&`, `||` and `|` join, and leave out what is the shell's own."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found: list[str] = []
    is_file = False  # of a redirection
    for word in [*words, ";"]:
        if set(word) <= set("<>"):
            is_file = True
        elif is_file:
            is_file = False
        elif not set(word) <= set(";&|"):
            found.append(re.sub(r"\$(\w+)", lambda name: VARIABLES.get(name[1], name[0]), word))
        else:
            while found and (found[0] in SHELL_WORDS or re.match(r"\w+=", found[0])):
                del found[0]
            if found:
                yield tuple(found)
            found = []


def script(words: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """Return what Python is to run, `scripts/NAME.py`, `benchmarks/NAME.py` or `-m MODULE`, and its arguments."""
    if words[0] == "cobra":
        return "-m cobra", list(words[1:])
    if Path(words[0]).name not in ("python", "torchrun", "srun"):
        return None
    for place, word in enumerate(words):
        if re.fullmatch(r"(scripts|benchmarks)/\w+\.py", word):
            return word, list(words[place + 1 :])
        if word == "-m" and words[place + 1].split(".")[0] == "cobra":
            return f"-m {words[place + 1]}", list(words[place + 2 :])
    return None
