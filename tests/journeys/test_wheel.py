"""The wheel works without a clone: what is in it, the command `cobra`, a training and an evaluation from it alone.

`make release-check` names the folder of the release to be tried in COBRA_DIST; without it a wheel is built here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import cobra
from cobra.data.toy import Toy
from cobra.data.toy import prepare as prepare_toy

FEW_IMAGES = Toy(train=4, vqav2=2, gqa=1, vizwiz=1, textvqa=1, vsr=1, pope=2, refcoco=2)
ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("COBRA_DIST", tmp_path_factory.mktemp("dist")))
    if not list(folder.glob("*.whl")):
        pytest.importorskip("hatchling")
        build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has Cobra from the wheel, and everything else from this one.

    A path in a .pth file makes this environment's packages visible, though not the clone, which it knows by a .pth file
    of its own. So nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(packages.stdout.strip(), "others.pth").write_text("\n".join(others))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--ignore-installed"]
    subprocess.run([*install, "--no-index", "--quiet", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run a program of that environment in the test's own folder, with no path to the clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / program), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return call


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git's list of files")
def test_wheel_has_what_it_needs_and_nothing_else(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = {name for name in listed.split() if name.startswith("cobra/")}
    expected |= {f"cobra/{name}" for name in listed.split() if name.startswith("configs/")}
    scripts = [name for name in listed.split() if name.startswith("scripts/")]
    expected |= {f"cobra/{name}" for name in scripts if not name.startswith("scripts/make_")}
    with ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        size = sum(info.file_size for info in archive.infolist())
    assert found == expected and "cobra/assets/tiny/tokenizer.json" in found
    assert size < 10e6


def test_commands_have_a_line_each(run: Run) -> None:
    shown = run("cobra", "--help").stdout
    for command in ("pretrain", "evaluate", "score", "compare", "prepare", "convert"):
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [command]]
        assert len(line.split()) > 4, line
    assert "make_toy" not in shown
    assert run("cobra", "--version").stdout.strip() == cobra.__version__
    mistake = run("cobra", "evalute")
    assert mistake.returncode == 1 and "Did you mean 'evaluate'?" in mistake.stderr and mistake.stderr.count("\n") == 1


def test_configs_come_with_the_wheel(run: Run, tmp_path: Path) -> None:
    (tmp_path / "configs" / "train").mkdir(parents=True)
    (tmp_path / "configs" / "train" / "mine.yaml").write_text("defaults: [tiny]\nmax_steps: 7\n")
    shown = run("cobra", "pretrain", "--cfg", "job", "train=mine")
    assert shown.returncode == 0, shown.stderr
    config = yaml.safe_load(shown.stdout)
    assert (config["train"]["max_steps"], config["train"]["stage"]) == (7, "finetune")


@pytest.mark.skipif("COBRA_DIST" not in os.environ, reason="takes minutes, as its kernels are compiled: release-check")
def test_trains_and_evaluates_without_a_clone(
    run: Run, small_overrides: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    where = run("python", "-c", "import cobra; print(cobra.__version__, cobra.__file__)")
    assert str(ROOT) not in where.stdout and where.returncode == 0, where.stderr
    settings = [text for text in small_overrides(tmp_path) if not text.startswith("paths.runs=")]
    trained = run("cobra", "pretrain", *settings, "train.max_steps=2", "parallel.processes=2")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / "small" / "model" / "model.safetensors").is_file()
    asked = ["benchmark=pope", "data_root=data/toy", "model=runs/small", "limit=5", "device=cpu"]
    prepare_toy(tmp_path / "data" / "toy", FEW_IMAGES)
    evaluated = run("cobra", "evaluate", *asked)
    assert evaluated.returncode == 0, evaluated.stderr
    assert (tmp_path / "results" / "pope" / "small" / "report.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs", "results"}
    converted = run("cobra", "convert", "runs/small", "exported", "--to", "public")
    assert converted.returncode == 0 and (tmp_path / "exported").is_dir(), converted.stderr
    described = run("python", "-m", "cobra.describe", "+experiment=cobra-3b")
    assert described.returncode == 0 and "Parameters" in described.stdout, described.stderr
