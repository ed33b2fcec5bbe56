"""The scripts as a user types them: help, configs, and mistakes that end in one line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cobra.config import EvaluateConfig, PretrainConfig, TrackerConfig, as_config
from cobra.errors import ConfigError
from cobra.eval.benchmark import Benchmark

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Script = Callable[..., subprocess.CompletedProcess[str]]


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


PRETRAIN = [
    f"{'+' if group == 'experiment' else ''}{group}={choice}"
    for group in (
        "model",
        "model/vision",
        "model/projector",
        "model/llm",
        "data",
        "train",
        "parallel",
        "tracker",
        "paths",
    )
    for choice in choices(group)
] + [f"+experiment={choice}" for choice in choices("experiment")]


@pytest.mark.parametrize("override", PRETRAIN)
def test_every_choice_passes_the_typed_door(tiny_config: Callable[..., PretrainConfig], override: str) -> None:
    config = tiny_config(override)
    assert config.run.name == (override.removeprefix("+experiment=") if "experiment" in override else "tiny")
    assert isinstance(config.tracker, TrackerConfig)


@pytest.mark.parametrize("benchmark", choices("benchmark"))
def test_every_benchmark_can_be_made(benchmark: str) -> None:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("evaluate", overrides=[f"benchmark={benchmark}", "load=x"])
    OmegaConf.set_struct(config, False)
    assert isinstance(instantiate(config.pop("benchmark")), Benchmark)
    assert as_config(EvaluateConfig, config).load == "x"


def test_every_config_file_is_tried_above() -> None:
    tried = {override.lstrip("+").replace("=", "/") for override in PRETRAIN}
    tried |= {f"benchmark/{name}" for name in choices("benchmark")}
    tried |= {"pretrain", "evaluate", "score", "prepare", "generate", "demo", "serve"}
    files = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert {name for name in files if not name.startswith("cli/")} == tried


def test_experiment_tiny_is_the_default(tiny_config: Callable[..., PretrainConfig]) -> None:
    assert tiny_config("+experiment=tiny") == tiny_config()


def test_folders_come_from_the_environment(tiny_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COBRA_DATA", "/somewhere")
    assert tiny_config().data.annotations == "/somewhere/easyvqa/train.json"


def test_cfg_job_prints_the_composed_config(script: Script, tmp_path: Path) -> None:
    result = script("pretrain", "--cfg", "job", "run.seed=7")
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    assert config["run"]["seed"] == 7 and config["train"]["stage"] == "finetune"
    assert not list(tmp_path.iterdir())  # and runs nothing


@pytest.mark.parametrize(("name", "example"), [("pretrain", "+experiment=tiny"), ("evaluate", "benchmark=easyvqa")])
def test_help_shows_groups_and_examples(script: Script, name: str, example: str) -> None:
    result = script(name, "--help")
    assert result.returncode == 0, result.stderr
    for text in (example, "tiny", "easyvqa", "device"):
        assert text in result.stdout
    settings = result.stdout.split("Settings (key=value)")[1]  # the list of a group's choices may be long
    assert max(map(len, settings.splitlines())) <= 160


def test_help_has_only_what_the_script_takes(script: Script) -> None:
    demo, score = (script(name, "--help").stdout for name in ("demo", "score"))
    assert "Groups" not in demo and "\nmodel: (must be given)\n" in demo and "load:" not in demo
    groups = score.split("Groups (group=choice)\n")[1].split("\n\n")[0]
    assert [line.split(":")[0] for line in groups.splitlines()] == ["  benchmark", "  paths"]
    pretrain = script("pretrain", "--help").stdout
    assert "\n  +experiment: " in pretrain and "\n  benchmark@validation.benchmark: " in pretrain
    assert script("pretrain", "--help", "hydra.help.template=mine").stdout == "mine\n"


def the_error(result: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a command that failed as it should."""
    output = result.stdout + result.stderr
    assert result.returncode not in (0, None) and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("pretrain", ["trian=tiny"], ["'trian'", "'train'"]),
        ("pretrain", ["train=tinny"], ["'tinny'", "'tiny'", "align"]),
        ("pretrain", ["train.max_stepz=3"], ["'train.max_stepz'", "'train.max_steps'"]),
        ("pretrain", ["+train.max_stepz=3"], ["'train.max_stepz'", "'max_steps'"]),
        ("pretrain", ["model/projector=fused-gelu"], ["'fused-gelu'", "'fused-gelu-mlp'"]),
        ("pretrain", ["+experiment=tyni"], ["'tyni'", "'tiny'"]),
        ("pretrain", ["train.per_device_batch_size=12"], ["=32", "=12", "24 or 36"]),
        ("pretrain", ["data.annotations=absent.json", "data.source=null"], ["absent.json"]),
        ("pretrain", ["--rerun", "absent.yaml"], ["absent.yaml"]),
        ("pretrain", ["--rerun", "absent.yaml", "+experiment=tiny"], ["absent.yaml"]),
        ("pretrain", ["experiment=tiny"], ["+experiment=..."]),
        ("pretrain", ["+experimant=tiny"], ["'experimant'", "'experiment'"]),
        ("pretrain", ["paths.data=/dev/null/x"], ["/dev/null"]),
        ("evaluate", ["model=x"], ["benchmark", "easyvqa"]),
        ("evaluate", ["benchmark=easyvqua", "model=x"], ["'easyvqua'", "'easyvqa'"]),
        ("evaluate", ["benchmark=easyvqa"], ["model is not set"]),
        ("evaluate", ["benchmark=easyvqa", "model=absent"], ["absent"]),
        ("evaluate", ["benchmark=easyvqa", "model=x", "limt=3"], ["'limt'", "'limit'"]),
        ("evaluate", ["benchmark=easyvqa", "model=x", "dtype=half"], ["dtype='half'"]),
        ("score", ["benchmark=gqqa", "predictions=x"], ["'gqqa'", "'gqa'"]),
        ("score", ["benchmark=gqa"], ["predictions is not set"]),
        ("score", ["benchmark=gqa", "predictions=absent"], ["predictions=absent"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_mistake_ends_in_one_line(
    script: Script, tmp_path: Path, name: str, arguments: list[str], words: list[str]
) -> None:
    line = the_error(script(name, *arguments))
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.max_steps=many"], ["train.max_steps='many'", "int"]),
        (["train.stage=aling"], ["train.stage='aling'", "'align'"]),
        (["train.epochs=null", "train.max_steps=null"], ["train.epochs", "train.max_steps"]),
        (["run.name=../x"], ["run.name='../x'"]),
        (["run.name=."], ["run.name='.'"]),
        (["run.seed=-1"], ["run.seed=-1"]),
        (["train.weight_decay=-1"], ["train.weight_decay=-1"]),
        (["train.betas=[0.9]"], ["train.betas=[0.9]", "two numbers"]),
        (["parallel.precision=fp16"], ["parallel.precision='fp16'", "bf16"]),
        (["model.llm.d_state=0"], ["model.llm.d_state=0"]),
        (["+model.llm.norm_eps=0"], ["model.llm.norm_eps=0", "greater than 0"]),
        (["+model.llm.norm_eps=-1e-5"], ["model.llm.norm_eps=-1e-05", "greater than 0"]),
        (["+model.llm.dt_rank=0"], ["model.llm.dt_rank=0", "greater than 0"]),
    ],
    ids=str,
)
def test_typed_door_names_the_setting(
    tiny_config: Callable[..., PretrainConfig], overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(*overrides)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message


def test_rerun_gives_the_same_weights(script: Script, small_run: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert script("pretrain", *small_run).returncode == 0
    result = script("pretrain", "--rerun", str(runs / "small" / "config.yaml"), "run.name=again")
    assert result.returncode == 0, result.stderr
    weights = [(runs / name / "model" / "model.safetensors").read_bytes() for name in ("small", "again")]
    assert weights[0] == weights[1]
    line = the_error(script("pretrain", *small_run, "train.max_steps=13"))  # the run folder of another config
    assert "train.max_steps: 12 there, 13 asked for" in line


def test_multirun_makes_one_run_folder_per_job(script: Script, small_run: list[str], tmp_path: Path) -> None:
    result = script("pretrain", "--multirun", *small_run, "train.max_steps=2", "run.seed=0,1")
    assert result.returncode == 0, result.stderr
    configs = sorted((tmp_path / "runs").rglob("config.yaml"))
    assert [yaml.safe_load(file.read_text())["run"]["seed"] for file in configs] == [0, 1]
    first, second = (file.parent / "model" / "model.safetensors" for file in configs)
    assert first.read_bytes() != second.read_bytes()
    assert json.loads(first.with_name("config.json").read_text())["name"] == "tiny"
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}  # nothing of Hydra's own
