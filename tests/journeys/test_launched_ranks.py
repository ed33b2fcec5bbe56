"""Several ranks of a script, started plainly: they begin together, and none stays behind when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_IN = Path(__file__).with_name("stand_in.py")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the stand-in for scripts/pretrain.py on two CPU ranks; whatever is left of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(name: str, *arguments: str, processes: int = 2) -> subprocess.Popen[str]:
        settings = [f"run.name={name}", f"parallel.processes={processes}", "parallel.device=cpu"]
        command = [sys.executable, str(STAND_IN), *arguments, f"paths.runs={tmp_path}", *settings]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def end_of(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit code and messages of a process that has to end by itself, within a minute by promise."""
    _, messages = process.communicate(timeout=timeout)
    return process.returncode, messages


def wait_until_ready(process: subprocess.Popen[str], folder: Path) -> None:
    while len(list(folder.glob("?.ready"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("?.json"))]


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_processes_of_the_config_are_started_and_joined(start: Start, tmp_path: Path) -> None:
    code, messages = end_of(start("sum"))
    assert code == 0 and not messages
    found = facts(tmp_path / "sum")
    assert [fact["sum"] for fact in found] == [[1.0, 1.0]] * 2
    assert found[0]["pid"] != found[1]["pid"]
    assert int(found[0]["threads"]) == max(1, len(os.sched_getaffinity(0)) // 2)  # the ranks share the cores


def test_one_process_does_the_work_itself(start: Start, tmp_path: Path) -> None:
    process = start("sum", processes=1)
    assert end_of(process) == (0, "")
    assert [(fact["pid"], fact["sum"]) for fact in facts(tmp_path / "sum")] == [(process.pid, [0.0, 0.5])]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("error", 1, ["[rank 1] error: Row 7 is broken.", "error: Rank 1 of 2 failed with exit code 1"]),
        ("bug", 1, ["ZeroDivisionError: a bug", "error: Rank 1 of 2 failed with exit code 1"]),
        ("killed", 137, ["error: Rank 1 of 2 was killed by SIGKILL."]),
    ],
)
def test_failed_rank_ends_all_and_is_named(
    start: Start, tmp_path: Path, name: str, code: int, words: list[str]
) -> None:
    found, messages = end_of(start(name))
    assert found == code and all(word in messages for word in words), messages
    assert messages.count("Traceback") == (name == "bug"), messages
    assert not [fact["pid"] for fact in facts(tmp_path / name) if is_alive(fact["pid"])]


def test_error_of_all_ranks_is_said_once(start: Start) -> None:
    code, messages = end_of(start("all"))
    assert code == 1 and messages.splitlines()[0] == "error: Row 7 is broken.", messages
    assert messages.count("Row 7") == 1, messages


def test_damaged_environment_ends_in_one_line(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "one", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, messages = end_of(start("sum"))
    assert code == 1 and messages.splitlines()[0].startswith("error: The environment variable RANK='one'"), messages
    assert len(messages.splitlines()) == 1


def test_rank_that_takes_no_hint_is_killed(start: Start, tmp_path: Path) -> None:
    code, messages = end_of(start("deaf"))
    assert code == 1 and "Row 7 is broken" in messages
    assert not [fact["pid"] for fact in facts(tmp_path / "deaf") if is_alive(fact["pid"])]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_every_rank_once(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("save")
    wait_until_ready(process, tmp_path / "save")
    process.send_signal(number)
    code, messages = end_of(process)
    assert code == (130 if number == signal.SIGINT else 75)
    assert messages.splitlines() == ["Saved."]  # said by one rank, and by no one else
    arrived = [json.loads(file.read_text()) for file in (tmp_path / "save").glob("?.saved")]
    assert arrived == [[number], [number]]


def test_signal_during_the_start_is_a_calm_end(start: Start, tmp_path: Path) -> None:
    process = start("save")
    time.sleep(1.5)
    process.send_signal(signal.SIGUSR1)
    code, messages = end_of(process)
    assert code in (75, -signal.SIGUSR1) and "Traceback" not in messages, messages


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_while_a_rank_waits_for_another_ends_both(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    """The wait is in C++, where a handler written in Python is never called."""
    process = start("late")
    while not (tmp_path / "1.late").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(3)  # rank 0 is as far by now, and waits
    process.send_signal(number)
    code, messages = end_of(process, timeout=60)
    assert code == (130 if number == signal.SIGINT else 75), messages
    assert messages.splitlines() == [f"Stopped by {number.name}; the same command goes on."]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_end_with_a_killed_parent(start: Start, tmp_path: Path) -> None:
    process = start("endless")
    wait_until_ready(process, tmp_path / "endless")
    process.kill()
    deadline = time.monotonic() + 60
    while any(is_alive(fact["pid"]) for fact in facts(tmp_path / "endless")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sweep_starts_the_ranks_of_each_job(start: Start, tmp_path: Path) -> None:
    code, messages = end_of(start("sum", "--multirun", "run.seed=3,4"), timeout=300)
    assert code == 0, messages
    found = {folder.name: facts(folder) for folder in tmp_path.glob("sum-*")}
    assert {name: [fact["seed"] for fact in of_run] for name, of_run in found.items()} == {
        "sum-run.seed-3": [3, 3],
        "sum-run.seed-4": [4, 4],
    }


def test_ranks_of_srun_join(tmp_path: Path) -> None:
    """Two tasks with the variables that SLURM gives them; they find each other by the job's number."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    command = [sys.executable, str(STAND_IN), f"paths.runs={tmp_path}", "run.name=sum", "parallel.device=cpu"]
    tasks = [
        subprocess.Popen(command, env=os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    assert [task.wait(60) for task in tasks] == [0, 0]
    assert [fact["sum"] for fact in facts(tmp_path / "sum")] == [[1.0, 1.0]] * 2


def test_ranks_of_torchrun_join(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(STAND_IN)]
    settings = [f"paths.runs={tmp_path}", "run.name=sum", "parallel.device=cpu", "parallel.processes=7"]  # ignored
    assert subprocess.run([*command, *settings], timeout=300).returncode == 0
    assert [fact["sum"] for fact in facts(tmp_path / "sum")] == [[1.0, 1.0]] * 2


SUBMITIT = ("--multirun", "hydra/launcher=submitit_local")  # the cluster's launcher, with this machine as the cluster


def test_submitted_job_starts_its_ranks(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    code, messages = end_of(start("sum", *SUBMITIT, "run.seed=3"), timeout=300)
    assert code == 0, messages
    assert [fact["seed"] for fact in facts(tmp_path / "sum")] == [3, 3]


def test_submitted_job_reports_its_error(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    code, messages = end_of(start("error", *SUBMITIT))
    assert code == 1 and messages.splitlines()[-1].startswith("error: Rank 1 of 2 failed"), messages
    assert "Traceback" not in messages
    (log,) = (tmp_path / ".submitit").rglob("*_log.err")
    assert "error: Row 7 is broken." in log.read_text()


def test_submitted_job_saves_before_it_is_requeued(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = start("save", *SUBMITIT)
    wait_until_ready(process, tmp_path / "save")
    first = facts(tmp_path / "save")
    os.kill(first[0]["parent"], signal.SIGUSR2)  # what SLURM sends before it ends a job
    code, messages = end_of(process)
    assert code == 0, messages
    assert len(list((tmp_path / "save").glob("?.saved"))) == 2
    assert first[0]["pid"] != facts(tmp_path / "save")[0]["pid"]  # started again, and found nothing left to do


def test_sweep_below_torchrun_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    code, messages = end_of(start("sum", "--multirun", "run.seed=3,4"))
    assert code == 1 and messages.startswith("[rank 1] error: --multirun below torchrun or srun"), messages
