"""A process that no longer moves: when it is ended, and what it leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from elite import checkpoint, compose, modes
from elite.callbacks import metrics_file
from elite.distributed.launch import HUNG, LAST_WORDS, WorkerError, _first_to_fail, leave_last_words
from elite.distributed.ranks import RankError, Ranks
from elite.distributed.watchdog import Watchdog, deadline_seconds
from elite.runfolder import RunFolder
from elite.vigilance import WatchdogConfig
from tests.conftest import ROOT, Program
from tests.executor.test_run_streamed import final, losses
from tests.test_run import only_run, wait_for_lines

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_the_deadline() -> None:
    assert deadline_seconds(WatchdogConfig(), step_s=1) == 1800 and deadline_seconds(WatchdogConfig(), step_s=3600) == 18000
    assert deadline_seconds(WatchdogConfig(minutes=2), step_s=3600) == 120 and deadline_seconds(WatchdogConfig(minutes=0), 1) == 0


def watched(folder: Path, deadline_s: float, work: Callable[[Watchdog], None]) -> list[int]:
    """Exit codes with which the watchdog would have ended the process."""
    codes = list[int]()
    with Watchdog(folder, ALONE, deadline_s, codes.append) as watchdog:
        work(watchdog)
    return codes


def test_what_hangs_is_ended_and_its_stacks_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def stuck_in_a_loader(watchdog: Watchdog) -> None:
        watchdog("reading the next batch")
        time.sleep(1.0)

    assert watched(tmp_path, 0.2, stuck_in_a_loader) == [HUNG]
    report, said = (tmp_path / "hang_rank0.txt").read_text(), capfd.readouterr().err
    assert "since reading the next batch began" in report and report.count("thread") >= 2
    for text in (report, said):
        assert "stuck_in_a_loader" in text and "watchdog.py" in text
    assert (tmp_path / LAST_WORDS).read_text().startswith("no sign of life for")


def test_signs_of_life_keep_it_away(tmp_path: Path) -> None:
    def at_work(watchdog: Watchdog) -> None:
        for _ in range(40):
            watchdog("a micro-batch")
            time.sleep(0.02)

    assert watched(tmp_path, 0.4, at_work) == [] and not (tmp_path / "hang_rank0.txt").exists()
    assert watched(tmp_path, 0.0, lambda watchdog: time.sleep(0.05)) == []
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_the_first_reason_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    leave_last_words(tmp_path, "no room")
    monkeypatch.setenv("RANK", "0")
    leave_last_words(tmp_path, "the other rank is gone")
    assert (tmp_path / LAST_WORDS).read_text() == "rank 1: no room"


def test_which_rank_is_named() -> None:
    assert _first_to_fail({0: 2, 1: -signal.SIGKILL}, 0) == (1, -signal.SIGKILL)
    assert _first_to_fail({0: HUNG, 1: -signal.SIGKILL}, 1) == (0, HUNG), "the launcher killed what did not hear it"
    assert _first_to_fail({0: 1, 1: -signal.SIGTERM}, 0) == (0, 1)
    assert str(WorkerError(137, "", 1)).startswith("the training process of rank 1 ended with exit code 137 (killed from outside")


def test_a_rank_that_waits_in_vain_says_for_what() -> None:
    pair = Ranks(0, 2, torch.device("cpu"))
    with (
        pytest.raises(RankError, match="rank 0 of 2 waited in vain for another one in all_reduce.*Connection closed by peer"),
        pair.meeting("all_reduce"),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2931")
    for error in (RuntimeError("mat1 and mat2 shapes"), torch.OutOfMemoryError("NCCL workspace: out of memory")):
        with pytest.raises(type(error)), pair.meeting("all_reduce"):
            raise error


TINY = ("debug=tiny", "training.completion_tokens=0", "training.max_steps=16", "training.val_every=8", "training.checkpoint_every=4")
PAIR = (*TINY, "hardware.gpus=2", "adapter.dropout=0.1")


def pair_of(tmp_path: Path, repository: Path, cache: Path, *overrides: str) -> subprocess.Popen[str]:
    """The program at work with two ranks."""
    command = [sys.executable, str(ROOT / "train.py"), f"data.repo={repository}", f"output.cache={cache}", *PAIR, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "120"}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes by rank."""
    found = [child for child in psutil.Process(process.pid).children() if "elite.worker" in " ".join(child.cmdline())]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.faults
def test_a_killed_rank_ends_the_other_and_the_run_continues_bit_for_bit(
    program: Program, tmp_path: Path, repository: Path, cache: Path
) -> None:
    environment = {"GLOO_SOCKET_IFNAME": "lo"}
    whole = program(*PAIR, "output.root=whole", environment=environment)
    assert whole.returncode == 0, whole.stderr
    process = pair_of(tmp_path, repository, cache)
    wait_for_lines(tmp_path, process, 7)
    _, victim = workers(process)
    killed = time.monotonic()
    victim.kill()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - killed < 30, "the other rank must not wait for what never comes"
    assert process.returncode == 137 and "Traceback" not in errors, errors
    assert "of rank 1 ended with exit code 137 (killed from outside" in errors and "the same command continues" in errors
    folder = only_run(tmp_path)
    assert not folder.finished
    again = program(*PAIR, environment=environment)
    assert again.returncode == 0 and "continuing the interrupted run" in again.stdout, again.stderr
    expected = RunFolder(next((tmp_path / "whole").glob("*/*/run.json")).parent)
    assert losses(folder) == losses(expected) and len(losses(folder)) == 16
    ours, theirs = final(folder), final(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.faults
def test_a_hung_rank_is_noticed_by_the_one_that_waits_for_it(tmp_path: Path, repository: Path, cache: Path) -> None:
    process = pair_of(tmp_path, repository, cache, "watchdog.minutes=0.1", "training.max_steps=10000")
    wait_for_lines(tmp_path, process, 4)
    _, hung = workers(process)
    hung.suspend()
    _, errors = process.communicate(timeout=120)
    folder = only_run(tmp_path)
    assert process.returncode == HUNG and "no sign of life for 0.1 minutes" in errors and "hang_rank0.txt" in errors, errors
    stacks = (folder.path / "hang_rank0.txt").read_text()
    assert "all_reduce" in stacks or "backward" in stacks or "barrier" in stacks or "all_gather" in stacks
    assert not hung.is_running() and "the same command continues" in errors


HANGING = """
import sys, threading
sys.path.insert(0, {root!r})
from elite.data.batches import TrainStream
real = TrainStream.next_window
def next_window(self, n):
    if self.state()["index"] >= 8:
        threading.Event().wait()
    return real(self, n)
TrainStream.next_window = next_window
from elite.worker import main
main()
"""


@pytest.mark.faults
def test_a_loader_that_hangs_ends_the_run_with_its_stack(
    tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = compose.from_overrides(f"data.repo={repository}", f"output.cache={cache}", *TINY, "watchdog.minutes=0.1")
    folder, _ = modes._prepare(request)
    done = subprocess.run(
        [sys.executable, "-c", HANGING.format(root=str(ROOT)), str(folder.path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == HUNG and "reading the next batch" in done.stderr, done.stderr
    assert "next_window" in (folder.path / "hang_rank0.txt").read_text()
    assert "reading the next batch" in (folder.path / LAST_WORDS).read_text()
    assert [line["step"] for line in metrics_file.read(folder.metrics) if "loss" in line] == [1, 2, 3, 4]
    assert checkpoint.latest(folder.checkpoints) == folder.checkpoints / "step_000004"
