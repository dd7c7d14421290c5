"""Ended at moments nobody chose, by kill -9 or a scheduler's signal, and continued, a run is the undisturbed one, byte for byte."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elite.runfolder import RunFolder
from tests.conftest import Trained, make_repository
from tests.test_exact_resume import MODES, REQUEST, assert_same

EACH = 5
"""Ends by one test, each of a run of its own."""
KILLS, TERMINATIONS = range(50 // EACH), range(20 // EACH)
LOOK_S = 0.002


def ended(run: Callable[[], object], number: signal.Signals, after_s: float) -> int:
    """Run in a process of its own that gets this signal so long after its beginning; how it ended, as `os.waitpid` says it."""
    child = os.fork()
    if child == 0:
        # As a process that a scheduler has started: what hears no signal yet is ended by it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    due = time.monotonic() + after_s
    while time.monotonic() < due:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(LOOK_S)
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


def through(trained: Trained, tmp_path: Path, mode: str, number: signal.Signals, seed: int, ends: int) -> int:
    """Ends of a run at random moments between its beginning and its end, each followed by the same command; how many came in time."""
    repository = make_repository(tmp_path / "few", files=8, lines=11)
    request = (*REQUEST, f"data.repo={repository}", *MODES[mode])
    began = time.monotonic()
    expected = trained(*request, "output.root=undisturbed")
    whole_s, moments, in_time = time.monotonic() - began, random.Random(seed), 0
    for end in range(ends):
        again = (*request, f"output.root=ended{end}")
        ended(lambda again=again: trained(*again), number, moments.uniform(0.0, whole_s))  # type: ignore[misc]
        before = [RunFolder(path.parent) for path in Path(f"ended{end}").glob("*/*/run.json")]
        begun = [folder for folder in before if folder.begun]
        in_time += not any(folder.finished for folder in before)
        done = trained(*again)
        assert done.finished
        # A checkpoint had been written: the run that was ended is the one that went on.
        assert all(folder.path.resolve() == done.path.resolve() for folder in before if folder in begun)
        assert_same(done, expected)
    return in_time


@pytest.mark.faults
def test_a_run_killed_at_random_is_the_undisturbed_one(trained: Trained, tmp_path: Path) -> None:
    assert through(trained, tmp_path, "lora", signal.SIGKILL, seed=99, ends=2) >= 1


@pytest.mark.faults
@pytest.mark.parametrize("seed", KILLS)
def test_fifty_kills(seed: int, trained: Trained, tmp_path: Path) -> None:
    mode = [*MODES][seed % len(MODES)]
    # The undisturbed run also measures the time, cold: the last moments may find a run that has ended.
    assert through(trained, tmp_path, mode, signal.SIGKILL, seed, EACH) >= EACH // 2


@pytest.mark.faults
@pytest.mark.parametrize("seed", TERMINATIONS)
def test_twenty_terminations(seed: int, trained: Trained, tmp_path: Path) -> None:
    mode = ["lora", "streamed", "full", "growing"][seed]
    assert through(trained, tmp_path, mode, signal.SIGTERM, seed, EACH) >= EACH // 2
