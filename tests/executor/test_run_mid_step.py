"""Whole runs that are killed or stopped within a streamed step, and continued by the same command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from elite.callbacks import metrics_file
from elite.executor.streamed.files import read_json
from elite.executor.streamed.journal import JOURNAL
from elite.runfolder import RunFolder
from tests.conftest import ROOT, Program, Trained

REQUEST = (
    "debug=tiny",
    "executor=streamed",
    "executor.boundaries=disk",
    "executor.chunk=128",
    "training.mid_step_checkpoint=true",
    "training.max_steps=2",
    "training.global_batch_tokens=1024",
    "training.completion_tokens=0",
    "model.num_hidden_layers=4",
    "tier.context=512",
    "adapter.dropout=0.1",
)


def losses(folder: RunFolder) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in metrics_file.read(folder.metrics) if "loss" in line}


def adapter(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.final / "adapter_model.safetensors")


def only_run(root: Path) -> RunFolder:
    (identity,) = (root / "runs").glob("*/*/run.json")
    return RunFolder(identity.parent)


def kept(root: Path) -> tuple[int, list[str]]:
    """Which step a run under `root` is at, and which stages of it are kept, by micro-batch and name; 0 if none is."""
    for path in root.glob(f"runs/*/*/mid_step/rank0/{JOURNAL}"):
        # It may go while it is looked at.
        with suppress(OSError):
            found = read_json(path)
            return found["key"]["step"], [f"{i} {stage}" for i, entry in enumerate(found["passes"]) for stage in entry["stages"]]
    return 0, []


def interrupted(root: Path, command: list[str], step: int, stage: str, end: Callable[[subprocess.Popen[str]], None]) -> RunFolder:
    """A run that is ended once it has kept a stage of a step."""
    # Threads that wait for each other on two busy cores would make a step take many times as long.
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=root, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while (at := kept(root))[0] != step or stage not in at[1]:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)
    end(process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors, errors
    return only_run(root)


def kill(process: subprocess.Popen[str]) -> None:
    """End the run at once, and what watches over it."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()


def stop(process: subprocess.Popen[str]) -> None:
    """Ask the run to end."""
    process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def ends() -> dict[str, RunFolder]:
    """The undisturbed run, once there is one."""
    return {}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("end", "step", "stage"),
    [(stop, 2, "0 backward_2"), (kill, 1, "0 forward_2"), (kill, 2, "1 backward_2")],
    ids=["SIGTERM", "kill", "kill late"],
)
def test_a_run_ended_within_a_step_goes_on(
    end: Callable[[subprocess.Popen[str]], None], step: int, stage: str, program: Program, trained: Trained, tmp_path: Path,
    repository: Path, cache: Path, ends: dict[str, RunFolder],
) -> None:  # fmt: skip
    if not ends:
        ends["undisturbed"] = trained(*REQUEST, "output.root=whole")
    command = [sys.executable, str(ROOT / "train.py"), f"data.repo={repository}", f"output.cache={cache}", *REQUEST]
    folder = interrupted(tmp_path, command, step, stage, end)
    at, stages = kept(tmp_path)
    assert at == step and stage in stages and not (folder.checkpoints / f"step_{step:06d}").exists()
    again = program(*REQUEST)
    assert again.returncode == 0, again.stderr
    micro_batch = int(stages[-1][0])
    words = f"step {step} goes on where it was cut off: micro-batch {micro_batch + 1}, after {sum(s[0] == stages[-1][0] for s in stages)}"
    assert "continuing the interrupted run" in again.stdout and words in " ".join(again.stderr.split()), again.stderr
    assert folder.finished and not folder.mid_step.exists()
    expected = ends["undisturbed"]
    assert losses(folder) == losses(expected) and len(losses(folder)) == 2
    one, two = adapter(folder), adapter(expected)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
