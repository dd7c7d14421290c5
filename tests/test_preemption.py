"""A scheduler's signal: the step is finished and saved, the exit code asks to be requeued, and the same command continues exactly."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from elite.distributed.launch import WorkerError, ended_by
from elite.errors import Preempted
from elite.jobs import State, read
from elite.runfolder import RunFolder
from tests.conftest import ROOT, Trained
from tests.test_exact_resume import assert_same
from tests.test_run import losses, only_run, wait_for_lines

REQUEST = (
    "debug=tiny", "training.max_steps=300", "training.val_every=100", "training.checkpoint_every=1000", "training.completion_tokens=0",
    "data.order=shuffled", "adapter.dropout=0.1",
)  # fmt: skip
LISTENING = """
import sys, time
sys.path.insert(0, {root!r})
from elite.training.signals import StopRequest
with StopRequest() as request:
    print("ready", flush=True)
    while True:
        time.sleep(0.02)
        if request.number and time.monotonic() - request._came_at > {end}:
            sys.exit(request.number)
"""


def start(folder: Path, repository: Path, cache: Path, *request: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), *request, f"data.repo={repository}", f"output.cache={cache}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def preempted(process: subprocess.Popen[str]) -> str:
    """What was said by a run that has ended as it should."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    said = [line for line in errors.splitlines() if line.strip()]
    assert len(said) == 1 and re.fullmatch(r"preempted: saved after step \d+; the same command continues", said[0]), errors
    return said[0]


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.faults),
    ],
)
def test_a_preempted_run_saves_and_asks_to_be_requeued(
    number: signal.Signals, ranks: int, tmp_path: Path, repository: Path, cache: Path
) -> None:
    request = (*REQUEST, f"hardware.gpus={ranks}")
    process = start(tmp_path, repository, cache, *request, GLOO_SOCKET_IFNAME="lo")
    wait_for_lines(tmp_path, process, 5)
    process.send_signal(number)
    said = preempted(process)
    folder = only_run(tmp_path)
    (kept,) = folder.checkpoints.glob("step_*")
    reached = int(kept.name.removeprefix("step_"))
    assert 0 < reached < 300 and reached == max(losses(folder)) and f"step {reached};" in said
    assert not folder.finished and folder.resumable


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_preempted_again_and_again_is_the_undisturbed_one(
    ranks: int, tmp_path: Path, repository: Path, cache: Path, trained: Trained
) -> None:
    request = (*REQUEST, "training.max_steps=60", "training.val_every=25", f"hardware.gpus={ranks}")
    if ranks == 1:
        expected = trained(*request, "output.root=undisturbed")
    else:
        whole = start(tmp_path, repository, cache, *request, "output.root=undisturbed", GLOO_SOCKET_IFNAME="lo")
        assert whole.communicate(timeout=200) and whole.returncode == 0
        expected = RunFolder(next((tmp_path / "undisturbed").glob("*/*/run.json")).parent)
    for lines in (5, 35):
        process = start(tmp_path, repository, cache, *request, GLOO_SOCKET_IFNAME="lo")
        wait_for_lines(tmp_path, process, lines)
        process.send_signal(signal.SIGTERM)
        preempted(process)
    last = start(tmp_path, repository, cache, *request, GLOO_SOCKET_IFNAME="lo")
    assert last.communicate(timeout=200) and last.returncode == 0
    assert_same(only_run(tmp_path), expected)


@pytest.mark.faults
def test_a_signal_to_every_process_is_one_signal(tmp_path: Path, repository: Path, cache: Path) -> None:
    """As a scheduler sends it to all of a job: a training process gets it twice, once from the launcher."""
    process = start(tmp_path, repository, cache, *REQUEST)
    wait_for_lines(tmp_path, process, 5)
    for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        one.send_signal(signal.SIGTERM)
    preempted(process)


@pytest.mark.faults
def test_under_another_launcher_the_process_itself_asks(tmp_path: Path, repository: Path, cache: Path) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    process = start(tmp_path, repository, cache, *REQUEST, **launched)
    wait_for_lines(tmp_path, process, 5)
    process.send_signal(signal.SIGTERM)
    preempted(process)


@pytest.mark.faults
def test_a_preempted_sweep_ends_and_goes_on(tmp_path: Path, repository: Path, cache: Path) -> None:
    request = ("-m", *REQUEST, "training.max_steps=60", "seed=0,1", "hydra.sweep.dir=sweep")
    process = start(tmp_path, repository, cache, *request)
    deadline = time.monotonic() + 120
    while not (tmp_path / "sweep/0/metrics.jsonl").is_file() or len(losses(RunFolder(tmp_path / "sweep/0"))) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    preempted(process)
    assert [job.state for job in read(tmp_path / "sweep").values()] == [State.running], "the second job is not begun"
    again = start(tmp_path, repository, cache, *request)
    output, errors = again.communicate(timeout=200)
    assert again.returncode == 0 and "continuing the interrupted run" in output, errors
    assert [job.state for job in read(tmp_path / "sweep").values()] == [State.finished] * 2


def listening(end: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", LISTENING.format(root=str(ROOT), end=end)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("numbers", "pause", "code"),
    [
        ((signal.SIGTERM,), 0.0, signal.SIGTERM),
        ((signal.SIGHUP,), 0.0, signal.SIGHUP),
        ((signal.SIGUSR2,), 0.0, signal.SIGUSR2),
        ((signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM), 0.05, signal.SIGUSR1),
        ((signal.SIGTERM, signal.SIGINT), 1.2, 128 + signal.SIGINT),
    ],
    ids=["a scheduler", "a terminal", "a warning", "an echo", "twice"],
)
def test_a_second_signal_ends_at_once_unless_it_is_the_first_ones_echo(numbers: Sequence[int], pause: float, code: int) -> None:
    process = listening(end=0.5 if pause < 1 else 20)
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    assert process.wait(timeout=10) == code


def test_what_ended_a_run_is_its_exit_code() -> None:
    saved = ended_by(signal.SIGTERM, "saved after step 7")
    assert isinstance(saved, Preempted) and saved.exit_code == 75 and str(saved) == "saved after step 7; the same command continues"
    assert "nothing was saved" in str(ended_by(signal.SIGUSR1, ""))
    assert isinstance(ended_by(signal.SIGINT, ""), KeyboardInterrupt)
    other = ended_by(signal.SIGQUIT, "")
    assert isinstance(other, WorkerError) and other.exit_code == 128 + signal.SIGQUIT
