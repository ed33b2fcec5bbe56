"""What users of Hydra expect: completion, own configs, sweeps that search."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from cobra.config import PrepareConfig, PretrainConfig, as_config
from cobra.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules in scripts/ can be imported; no own configs stay behind."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from _configs import OwnConfigs

    monkeypatch.setattr(OwnConfigs, "first", None)
    yield


def composed(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("cobra ", ["pretrain", "evaluate", "compare"], ["make_toy_benchmarks", "_launch"]),
        ("cobra compare ", [], ["pretrain"]),
        ("cobra pretrain +experiment=tiny-s", ["+experiment=tiny-siglip"], ["+experiment=tiny"]),
        ("cobra evaluate benchmark=", ["benchmark=pope", "benchmark=gqa"], ["pretrain"]),
    ],
)
def test_shell_completion(line: str, offered: list[str], not_offered: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "COMP_LINE": line, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cobra", "-sc", "query=bash"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert set(offered) <= set(words) and not set(not_offered) & set(words)


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_a_script_is_called_by_its_own_name_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cobra import __main__ as program

    ran: list[str] = []
    monkeypatch.setattr(program.runpy, "run_path", lambda path, run_name: ran.append(Path(path).name))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["cobra", name, "model=x"])
    program.main()
    assert ran == ["generate.py"] and sys.argv == ["cobra", "model=x"]


def test_own_configs_are_found(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from _configs import find_own_configs, groups, has_config

    for name, text in (("train/mine", "max_steps: 7\n"), ("train/tiny", "max_steps: 8\n"), ("mixes/one", "a: 1\n")):
        file = tmp_path / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "cobra"):
        find_own_configs(None)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["configs/train/tiny.yaml"]
    assert composed("pretrain", "train=mine").train.max_steps == 7
    assert composed("pretrain", "train=tiny").train.max_steps == 400  # Cobra's
    assert has_config("train/mine") and not has_config("train/other") and "mixes" in groups()
    caplog.clear()
    find_own_configs("configs")
    assert not caplog.records
    assert composed("pretrain", "train=tiny").train.max_steps == 8


def test_own_data_cannot_take_a_name_of_cobras(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prepare import check_own_name

    monkeypatch.chdir(tmp_path)

    def own(name: str) -> PrepareConfig:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            asked = ["own.annotations=a.csv", "own.images=b", f"own.name={name}"]
            return as_config(PrepareConfig, hydra.compose("prepare", overrides=asked))

    check_own_name(own("mine"))
    with pytest.raises(ConfigError, match=r"own.name=toy"):  # data=toy would be Cobra's
        check_own_name(own("toy"))


def test_search_is_told_the_score_or_else_the_loss(
    scripts: None, tiny_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    from pretrain import outcome

    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "validation/easyvqa": 30.0}, {"step": 2, "loss": 1.5}]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcome(tiny_config(f"paths.runs={tmp_path}")) == 1.5
    assert outcome(tiny_config(f"paths.runs={tmp_path}", "validation.every=1")) == 30.0


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--multirun", "benchmark=pope,vsr", "output=out"], True),
        (["--multirun", "benchmark=pope", "load=a,b", "output=out"], True),
        (["--multirun", "benchmark=pope,vsr", "output=out/${benchmark.name}"], False),
        (["--multirun", "benchmark=pope", "load=a,b", "output=a,b"], False),
        (["--multirun", "benchmark=pope,vsr"], False),
        (["benchmark=pope", "output=out"], False),
    ],
    ids=str,
)
def test_sweep_into_one_folder_is_refused_before_the_first_evaluation(
    scripts: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    arguments: list[str],
    refused: bool,
) -> None:
    from _command_line import check

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    if not refused:
        check("evaluate", [])
        return
    with pytest.raises(SystemExit):
        check("evaluate", [])
    assert "output=out is one folder for all evaluations of this sweep" in caplog.text


@pytest.mark.parametrize("option", ["--experiment", "--exp", "--experimental-rerun", "--experimental-rerun="])
def test_no_option_reads_a_pickle(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, option: str
) -> None:
    """Hydra has one, and takes beginnings of its name for it."""
    from _launch import launch

    file = tmp_path / "run.pkl"
    file.write_bytes(b"cposix\nmkdir\n(S'" + str(tmp_path / "was_run").encode() + b"'\ntR.")
    words = [option + str(file)] if option.endswith("=") else [option, str(file)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    with pytest.raises(SystemExit):
        launch("pretrain", lambda _: pytest.fail("was run"))
    assert "There is no option --exp" in caplog.text
    assert not (tmp_path / "was_run").exists()


def test_no_library_takes_a_stop_for_an_error_of_its_own(scripts: None, caplog: pytest.LogCaptureFixture) -> None:
    from _launch import Task

    def main(_cfg: DictConfig) -> None:
        with suppress(Exception):  # as many do around an import
            signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")

    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.INFO, "cobra"), pytest.raises(SystemExit) as end:
        Task("pretrain", main)(DictConfig({}))
    assert end.value.code == 75 and "Stopped by SIGTERM; the same command goes on." in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before


def run_check(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Check a script's command line, as it does before it begins."""
    from _command_line import check, take_benchmarks, use_own_names

    monkeypatch.setattr(sys, "argv", [*words])
    use_own_names(words[0])
    check(words[0], take_benchmarks() if words[0] == "evaluate" else [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("score", "data_root=x"), "Name a benchmark: benchmark=NAME. Choose from"),
        (("evaluate", "data_root=x"), "Name a benchmark: benchmark=NAME, several as benchmark=NAME,NAME, or"),
        (("pretrain", "benchmark=pope"), "'benchmark' is written benchmark@validation.benchmark=... here."),
        (("pretrain", "experiment=tiny"), "so it is added with a plus: +experiment=..."),
        (("evaluate", "benchmark=gqa", "data_rot=/d"), "Did you mean 'data_root'?"),
        (("generate", "model"), "Error parsing override 'model'"),
        (("pretrain", "--multirun", "+experiment=glob(big*)"), "+experiment=glob(big*): nothing fits; there are "),
    ],
)
def test_what_is_wrong_is_said_in_the_words_that_were_typed(
    scripts: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    words: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        run_check(monkeypatch, *words)
    assert message in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", "--multirun", "+experiment=glob(tiny-s*)"),
        ("evaluate", "--multirun", "benchmark=glob([g*,p*])", "model=a"),
        ("pretrain", "data_root=/data"),
    ],
)
def test_what_hydra_knows_composes(scripts: None, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    run_check(monkeypatch, *words)


def test_the_last_of_two_benchmarks_counts(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from _command_line import take_benchmarks

    monkeypatch.setattr(sys, "argv", ["evaluate", "benchmark=gqa,pope", "benchmark=vsr,pope"])
    assert take_benchmarks() == ["vsr", "pope"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "benchmark=gqa,pope", "benchmark=vsr"])
    assert take_benchmarks() == [] and composed("evaluate", *sys.argv[1:]).benchmark.data_root


def test_rerun_needs_a_file(scripts: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from _command_line import take_rerun

    monkeypatch.setattr(sys, "argv", ["pretrain", "--rerun"])
    with pytest.raises(SystemExit):
        take_rerun()
    assert "--rerun needs a run folder's config.yaml" in caplog.text
    monkeypatch.setattr(sys, "argv", ["pretrain", "--rerun", "a.yaml", "run.seed=1"])
    assert take_rerun() == "a.yaml" and sys.argv == ["pretrain", "run.seed=1"]
