"""Launchers of others: where ranks stand and meet, as torchrun, DeepSpeed and Slurm say it, on several machines."""

import json
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import hydra
import pytest

from elite import compose, modes, worker
from elite.config import CONF_DIR
from elite.distributed.ranks import PORTS, Ranks, by_slurm, first_host, joined, launched, place, ranks_here
from elite.errors import ConfigError
from elite.runfolder import RunFolder
from tests.distributed.forked import together
from tests.distributed.test_ddp import TINY

TORCHRUN = {"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}
SRUN = {
    **{"SLURM_LOCALID": "1", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
    **{"SLURM_STEP_NODELIST": "gpu[017-018]", "SLURM_JOB_ID": "4711"},
}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *DEEPSPEED, *SRUN):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment", [TORCHRUN, DEEPSPEED, SRUN], ids=["torchrun", "deepspeed", "srun"])
def test_a_rank_of_the_second_machine_finds_its_place(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched() and place() == (0, 0, 1) and ranks_here() is None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() and place() == (1, 5, 8) and ranks_here() == 4
    assert by_slurm() == (environment is SRUN)


def test_a_launcher_inside_a_slurm_step_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SRUN | TORCHRUN | {"RANK": "6"}).items():
        monkeypatch.setenv(name, value)
    assert not by_slurm() and place() == (1, 6, 8)


def test_one_task_of_slurm_launches_its_ranks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with hydra/launcher=submitit_slurm, one task a machine."""
    for name, value in (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    assert not launched() and place() == (0, 0, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu1", "gpu1"), ("gpu[003-005,9]", "gpu003"), ("gpu[7]-ib,big1", "gpu7-ib"), ("a-b1,c[1-2]", "a-b1"), ("10.0.0.3", "10.0.0.3")],
)
def test_ranks_meet_on_the_first_machine(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def job() -> int:
    """Number of a job whose port is free."""
    for number in range(len(PORTS)):
        with closing(socket.socket()) as one:
            if one.connect_ex(("127.0.0.1", PORTS[number])):
                return number
    raise AssertionError("no port is free")


def tasks(world: int) -> Callable[[int], dict[str, str]]:
    """Environments of a step's tasks, each on a machine of its own."""
    number = str(job())

    def environment(rank: int) -> dict[str, str]:
        own = {"SLURM_LOCALID": "0", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_JOB_ID": number}
        return own | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": f"1(x{world})"}

    return environment


def test_ranks_that_srun_started_meet(tmp_path: Path) -> None:
    def work(_: Ranks, folder: Path) -> list[float]:
        with joined() as ranks:
            return [ranks.rank, ranks.world, ranks.sum(ranks.rank + 1)]

    assert together(tmp_path, 2, work, tasks(2)) == [[0, 2, 3], [1, 2, 3]]


@pytest.mark.slow
def test_ranks_that_srun_started_train_in_one_folder(
    tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 makes it, and tells the other."""
    monkeypatch.chdir(tmp_path)

    def work(_: Ranks, folder: Path) -> None:
        composed = compose.from_overrides(*TINY, f"data.repo={repository}", f"output.cache={cache}")
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            modes.run(composed)

    together(tmp_path / "meeting", 2, work, tasks(2))
    (identity,) = (tmp_path / "runs").glob("*/*/run.json")
    folder = RunFolder(identity.parent)
    assert folder.finished and json.loads(folder.plan.read_text())["ranks"] == 2


def test_a_machine_that_does_not_see_the_run_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(modes, "_prepare", lambda composed: (RunFolder(tmp_path / "elsewhere"), 1))
    monkeypatch.setattr(worker, "train", lambda *_: pytest.fail("nothing is there to train"))
    composed = compose.from_overrides(*TINY)
    with (
        hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"),
        pytest.raises(ConfigError, match="rank 0 does not see the run folder .*elsewhere that rank 0 has made"),
    ):
        modes.train(composed)
