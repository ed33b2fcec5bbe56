"""Every code block of the documentation: Python runs, commands compose, configs and JSON are what they say."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from code_blocks import PAGES, ROOT, Block, Command, blocks, commands, commands_in_sentences, script
from in_process import SMALL_TRAINING, check, run

import cobra
from cobra.config import ServeConfig
from cobra.runtime import write_text
from cobra.serve.run import Server, listen
from cobra.serve.service import Service

BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"bash", "python", "yaml", "json", "text", "markdown"}
NEEDS = {"gpu", "download", "cluster", "account", "install", "clone", "files"}
# Blocks that need something of these may start programs that are not here.
ELSEWHERE = {"cluster", "account", "install", "download"}
HARMLESS = {"cd", "export", "git", "ls", "make", "pip", "source", "eval", "exit", "break", "["}
SERVER = "http://127.0.0.1:8000"
# What makes a script's work small.
SMALL = {"pretrain": SMALL_TRAINING, "evaluate": ["limit=4", "device=cpu"], "generate": ["max_new_tokens=4"]}
# Programs that run until they are stopped, and the tests that start and stop them.
STARTED_BY = {"demo": "tests/journeys/test_demo.py", "serve": "tests/serve/test_serve_script.py"}
# Pages that another test follows step by step. It writes their files (`needs: files`), and changes a clone as they say.
FOLLOWED = {"docs/extending.md": "test_docs_extending.py"}


def in_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def by_page(language: str) -> list[str]:
    return sorted({block.page for block in in_language(language)})


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block}: the language is {block.language or 'missing'}"
    assert block.needs is None or (block.needs in NEEDS and block.language in ("bash", "python"))


COMMANDS = [command for block in in_language("bash") for command in commands(block)]
COMMANDS += [command for page in PAGES for command in commands_in_sentences(page)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_composes(own_configs: None, command: Command) -> None:
    found = script(command.words)
    if found is None:
        check_other(command)
    elif command.block.needs != "clone":
        check(*found)


def check_other(command: Command) -> None:
    """A command of other programs: one that everybody has, about something that is there."""
    name, *arguments = command.words
    name = name.removeprefix(".venv/bin/")
    if name == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, f"{command}: no such target"
    if name == "pip":
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        asked = re.findall(r"(?:\.|cobra-vlm)\[(.+)\]", " ".join(arguments))
        assert set(",".join(asked).split(",")) - {""} <= extras, f"{command}: no such extra"
    is_harmless = name in HARMLESS or command.words[:3] == ("python", "-m", "pytest")
    assert is_harmless or command.block.needs in ELSEWHERE, f"{command}: what is {name}?"


@pytest.fixture(scope="module")
def folder_with_configs(after_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to repeat, the configs that pages tell to write, and that of data that `prepare` has made."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(after_demo / "runs", folder / "runs")
    files = {"data/mine": "defaults:\n  - easyvqa\n"}
    files |= {name: block.text for block in in_language("yaml") if (name := config_name(block))}
    for name, text in files.items():
        write_text(folder / "configs" / f"{name}.yaml", text)
    return folder


@pytest.fixture
def own_configs(folder_with_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_with_configs)


def config_name(block: Block) -> str | None:
    """`train/mine` for a block that begins with `# configs/train/mine.yaml`."""
    found = re.match(r"(?:# @package .+\n)?# configs/(.+)\.yaml\n", block.text)
    return found[1] if found else None


@pytest.mark.parametrize("block", in_language("yaml"), ids=str)
def test_yaml_composes(own_configs: None, block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)
    if (name := config_name(block)) and block.page not in FOLLOWED:
        group, _, choice = name.rpartition("/")
        if group == "benchmark":
            check("scripts/evaluate.py", [f"benchmark={choice}", "model=runs/tiny"])
        else:
            check("scripts/pretrain.py", [f"{'+' if group == 'experiment' else ''}{group}={choice}"])


@pytest.mark.parametrize("block", in_language("json"), ids=str)
def test_json_is_json(block: Block) -> None:
    """One value, or one in each line."""
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("page", [page for page in by_page("python") if page not in {"README.md", *FOLLOWED}])
def test_python_of_page_runs(scratch: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """In order, in one namespace. Conversions in between are run too: what follows reads what they wrote."""
    if "trust_remote_code" in (ROOT / page).read_text():
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(scratch / "modules"))
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(served()) if SERVER in (ROOT / page).read_text() else SERVER
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(ROOT / page):
            if block.needs is None and block.language == "python":
                run_python(block, namespace, address)
            elif block.needs is None and block.language == "bash":
                for command in commands(block):
                    found = script(command.words)
                    if found is not None and found[1][:1] == ["runs/tiny"]:
                        assert run(*found) == 0, command


def run_python(block: Block, namespace: dict[str, Any], address: str = SERVER) -> None:
    code = "\n" * (block.line - 1) + block.text.replace(SERVER, address)  # so that errors name the page's own line
    exec(compile(code, str(ROOT / block.page), "exec"), namespace)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server of runs/tiny, as `scripts/serve.py` starts it."""
    config = ServeConfig(load="runs/tiny", port=0)
    with listen(config) as listener:
        server = Server(Service(cobra.load("runs/tiny"), config))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_readme_is_followed(scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first line to the last, each command with settings that make it small.

    `make test` is what runs this, and `make demo` installs Cobra and then runs two of these commands in full size.
    """
    shutil.rmtree("runs")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    done: set[str] = set()
    for block in blocks(ROOT / "README.md"):
        if block.needs is None and block.language == "python":
            run_python(block, namespace)
        elif block.needs is None and block.language == "bash":
            for command in commands(block):
                if (found := script(command.words)) and (name := name_of(*found)) not in STARTED_BY:
                    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"what shape is it?\n")))
                    assert run(found[0], [*found[1], *made_small(name, found[1])]) == 0, command
                    done.add(name)
    assert {"pretrain", "evaluate", "generate", "convert", "prepare", "cobra.describe"} <= done
    runs = {path.name for path in Path("runs").iterdir() if (path / "model").is_dir()}
    assert {"tiny", "tiny-run.seed-2", "again", "mine"} <= runs
    assert json.loads(Path("results/easyvqa/tiny/results.json").read_text())["num_questions"] == 4
    shown = capsys.readouterr().out
    assert "Settings (key=value)" in shown and "cobra-3b" in shown  # of --help and cobra.describe


def name_of(script: str, arguments: list[str]) -> str:
    """Return `pretrain` for `scripts/pretrain.py` and for `-m cobra pretrain`."""
    return arguments[0] if script == "-m cobra" else Path(script.removeprefix("-m ")).name.removesuffix(".py")


def made_small(name: str, arguments: list[str]) -> list[str]:
    """Return settings that make a command of the README take a second."""
    if {"--help", "--rerun"} & {*arguments}:  # the latter's file holds them
        return []
    small = [*SMALL.get(name, [])]
    if name == "pretrain" and not any(argument.startswith("data=") for argument in arguments):
        small.append("data=easyvqa")  # the experiments' own is larger
    if any(argument.startswith("validation.every=") for argument in arguments):
        small += ["validation.every=1", "validation.limit=4", "run.name=validated"]
    return small


def test_followed_pages_have_their_tests() -> None:
    for page, test in FOLLOWED.items():
        assert (ROOT / page).is_file() and Path(__file__).with_name(test).is_file()
