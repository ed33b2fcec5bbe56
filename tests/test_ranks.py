"""How a process finds out which rank it is, and what a run of one process does without any others."""

from __future__ import annotations

import os

import pytest

from cobra.errors import ConfigError
from cobra.ranks import Ranks, _complete_environment, _first_host, _what_happened, env_ranks, joined

SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4007",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what started the tests themselves."""
    for name in (*SLURM, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what a test writes is undone
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),  # torchrun with one process
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, (3, 8)),
        (SLURM, (9, 16)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # srun for one task, or a shell on a node
        (SLURM | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2)),  # torchrun, or our own ranks, in a task
    ],
)
def test_environment_tells_the_rank(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int] | None
) -> None:
    set_all(monkeypatch, variables)
    assert env_ranks() == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be from 0 to WORLD_SIZE=2 - 1"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_PROCID='' must be a whole number"),
    ],
)
def test_damaged_environment_is_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(ConfigError, match=words):
        env_ranks()


def test_missing_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"), joined("cpu", 1):
        pass


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu-a1,gpu-a2", "gpu-a1"),
        ("rack[2-3]n[1-4]", "rack2n1"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert _first_host(nodes) == first


def test_slurm_tasks_meet_at_the_first_host(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    _complete_environment()
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert 10000 <= int(os.environ["MASTER_PORT"]) < 30000


def test_given_address_wins_over_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    _complete_environment()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_one_process_needs_no_others() -> None:
    with joined("cpu", 1) as ranks:
        assert ranks == Ranks() and ranks.is_first and ranks.host_group is None
        assert ranks.sum([1, 2.5]) == [1.0, 2.5]
        assert ranks.gather({"a": [1, None]}) == [{"a": [1, None]}]
        assert ranks.agree("x") == "x"
        ranks.barrier()


@pytest.mark.parametrize(
    ("message", "ranks", "words"),
    [
        ("gloo: Connection closed by peer", Ranks(0, 2), "Rank 1 of 2 has died"),
        ("gloo: Connection closed by peer", Ranks(0, 8), "Another rank of 8 has died"),
        ("gloo: Timed out waiting 6000ms", Ranks(3, 8), "Rank 3 of 8 has waited for another rank for 10 minutes"),
    ],
)
def test_lost_rank_is_told_from_a_slow_one(message: str, ranks: Ranks, words: str) -> None:
    assert words in _what_happened(message, ranks, 10.0)
