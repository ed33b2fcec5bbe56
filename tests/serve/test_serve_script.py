"""`scripts/serve.py` as a user starts it."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest

from cobra.api import Cobra
from cobra.config import ServeConfig, as_config
from cobra.errors import ConfigError
from cobra.serve.run import listen

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def compose(*overrides: str) -> ServeConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return as_config(ServeConfig, hydra.compose("serve", overrides=["load=x", *overrides]))


def test_settings_file_holds_the_defaults(monkeypatch) -> None:
    monkeypatch.delenv("COBRA_API_KEY", raising=False)
    assert compose() == ServeConfig(load="x")
    monkeypatch.setenv("COBRA_API_KEY", "secret")
    assert compose().api_key == "secret"


@pytest.mark.parametrize(
    "override",
    [
        "port=70000",
        "api_key=''",
        "api_key='schl\u00fcssel'",
        "max_rows=0",
        "timeout=-1",
        "temperature=-1",
        "max_tokens=8",
        "dtype=half",
    ],
)
def test_impossible_settings_are_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        compose(override)


def test_taken_port_is_told_before_a_model_is_loaded() -> None:
    with listen(ServeConfig(load="x", port=0)) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"port=\d+: Address already in use"):
            listen(ServeConfig(load="x", port=taken.getsockname()[1]))


def test_missing_extra_is_named(command: Callable[..., list[str]]) -> None:
    name, script, *arguments = command("serve", "model=x")
    hide = "import importlib.util as u, runpy, sys; find = u.find_spec; "
    hide += "u.find_spec = lambda name, *a: None if name == 'uvicorn' else find(name, *a); "
    hide += f"sys.argv = sys.argv[1:]; sys.path.insert(0, {str(Path(script).parent)!r}); "
    hide += "runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([name, "-c", hide, script, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == "error: The server needs uvicorn: pip install 'cobra-vlm[serve]'\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_printed_example_works_until_sigterm(command, vlm: Cobra, tmp_path: Path) -> None:
    vlm.save_pretrained(tmp_path / "model")
    arguments = [f"model={tmp_path / 'model'}", "port=0", "ops=reference", "name=mine", "default_tokens=5"]
    with subprocess.Popen(command("serve", *arguments), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        printed = ""
        while "messages" not in printed:
            line = process.stderr.readline()
            assert line, printed
            printed += line
        example = re.search(r"curl .*}'", printed, re.DOTALL)
        assert example is not None
        words = shlex.split(example[0].replace("\\\n", ""))
        answer = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True, timeout=30)
        assert '"finish_reason":"length"' in answer.stdout, answer.stderr
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "POST /v1/chat/completions 200" in rest and rest.endswith("Stopped.\n")
