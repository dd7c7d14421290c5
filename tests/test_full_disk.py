"""Whole runs on a disk that fills: the run and its last checkpoint live on, the metrics file misses no line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elite import checkpoint, worker
from elite.callbacks.metrics_file import MetricsFile, read
from elite.distributed import gradients
from elite.errors import CheckpointError
from elite.runfolder import RunFolder
from tests.conftest import ROOT, Trained
from tests.disks import Disk, fill

REQUEST = ("debug=tiny", "training.completion_tokens=0", "training.max_steps=6", "training.val_every=1000", "schedule=constant")


def at_steps(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[], Any]]) -> None:
    """Do something when a step has been taken, before its line is written."""
    written = MetricsFile.step

    def step(self: MetricsFile, record: dict[str, float]) -> None:
        acts.get(int(record["step"]), lambda: None)()
        written(self, record)

    monkeypatch.setattr(MetricsFile, "step", step)


def of_run(folder: RunFolder) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """What must not differ: every step's loss in order, and the result."""
    lines = [(line["step"], line["loss"]) for line in read(folder.metrics) if "loss" in line]
    return lines, load_file(folder.final / "adapter_model.safetensors")


def assert_same(one: RunFolder, two: RunFolder) -> None:
    (lines, adapter), (expected_lines, expected) = of_run(one), of_run(two)
    assert lines == expected_lines
    assert adapter.keys() == expected.keys() and all(torch.equal(adapter[name], expected[name]) for name in expected)


@pytest.mark.faults
def test_a_run_goes_on_while_its_disk_is_full(
    trained: Trained, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # More lines than fit into the block that the metrics file has already.
    request = [*REQUEST, "training.max_steps=16"]
    expected = trained(*request, "output.root=whole")
    room = disk("size=12m")
    at_steps(monkeypatch, {3: lambda: fill(room), 15: (room / "ballast").unlink})
    folder = trained(*request, f"output.root={room}")
    assert folder.finished
    assert_same(folder, expected)
    summary = json.loads(folder.summary.read_text())
    assert summary["checkpoints_failed"] == 6 and summary["checkpoints_saved"] == 2 and summary["checkpoint_s"] > 0
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_000016"]
    said = [record.getMessage() for record in caplog.records]
    assert sum("checkpoint of step 4 is not saved" in text for text in said) == 1
    assert sum("takes no more lines (No space left on device)" in text for text in said) == 1


@pytest.mark.faults
def test_a_run_whose_end_cannot_be_saved_says_so_and_continues_when_there_is_room(
    trained: Trained, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(*REQUEST, "output.root=whole")
    room = disk("size=12m")
    with monkeypatch.context() as patched:
        at_steps(patched, {5: lambda: fill(room)})
        with pytest.raises(CheckpointError, match="the run's end is not saved: checkpoint of step 6") as raised:
            trained(*REQUEST, f"output.root={room}")
    assert "the same command continues from step_000004" in raised.value.remedy
    (identity,) = room.glob("*/*/run.json")
    folder = RunFolder(identity.parent)
    assert not folder.finished and not folder.final.exists() and folder.begun
    (room / "ballast").unlink()
    assert trained(*REQUEST, f"output.root={room}").path == folder.path
    assert folder.finished
    assert_same(folder, expected)


@pytest.mark.parametrize("what", ["export", pytest.param("summary", marks=pytest.mark.faults)])
def test_results_that_cannot_be_written_are_none(
    trained: Trained, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    room = disk("size=12m")
    name, module = ("export", gradients) if what == "export" else ("_summary", worker)
    function = getattr(module, name)

    def full(*arguments: Any) -> Any:
        fill(room)
        return function(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, full)
        with pytest.raises(CheckpointError, match="could not be written: No space left on device") as raised:
            trained(*REQUEST, f"output.root={room}")
    assert "the same command continues" in raised.value.remedy and len(str(raised.value).splitlines()) == 2
    (identity,) = room.glob("*/*/run.json")
    folder = RunFolder(identity.parent)
    assert not folder.finished and folder.final.exists() == (what == "summary")
    (room / "ballast").unlink()
    trained(*REQUEST, f"output.root={room}")
    assert folder.finished and json.loads(folder.summary.read_text())["steps"] == 6


def test_lines_that_found_no_room_come_in_order_and_whole(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    room = disk("size=1m")
    file = MetricsFile(room / "metrics.jsonl", 0)
    fill(room, leave_bytes=20_000)
    for step in range(1, 1001):
        file.step({"step": step, "loss": 1 / step})
    assert len(read(room / "metrics.jsonl")) < 1000
    (room / "ballast").unlink()
    file.validation({"step": 1000, "val_loss": 2.0})
    file.end({})
    lines = read(room / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 1001), 1000]
    assert caplog.text.count("takes no more lines") == 1


def test_a_run_that_went_back_on_a_full_disk_has_each_step_once(disk: Disk) -> None:
    room = disk("size=1m")
    file = MetricsFile(room / "metrics.jsonl", 0)
    fill(room, leave_bytes=5_000)
    for step in range(1, 501):
        file.step({"step": step, "loss": 1.0})
    assert 0 < len((room / "metrics.jsonl").read_bytes().splitlines()) < 400
    for step in range(401, 601):
        file.step({"step": step, "loss": 2.0})
    (room / "ballast").unlink()
    file.end({})
    lines = read(room / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 601)]
    assert [line["loss"] for line in lines] == [1.0] * 400 + [2.0] * 200


def test_a_run_that_continues_on_a_full_disk_keeps_its_lines(disk: Disk) -> None:
    room = disk("size=1m")
    path = room / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5')
    fill(room)
    MetricsFile(path, 2).end({})
    assert [line["step"] for line in read(path)] == [1, 2]
    (room / "ballast").unlink()
    # After a rewind a step's line stands there again, behind later ones.
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 2, 3, 4)))
    MetricsFile(path, 3).end({})
    assert [line["step"] for line in read(path)] == [1, 2, 3, 2, 3]


def test_a_file_or_folder_is_whole_or_as_it_was(disk: Disk) -> None:
    room = disk("size=1m")
    checkpoint.write_text(room / "summary.json", "before")

    def large(place: Path) -> None:
        place.mkdir()
        (place / "weights").write_bytes(bytes(2 * 2**20))

    with pytest.raises(OSError):
        checkpoint.write_text(room / "summary.json", "x" * 2 * 2**20)
    with pytest.raises(OSError):
        checkpoint.write_folder(room / "final", large)
    assert (room / "summary.json").read_text() == "before" and [path.name for path in room.iterdir()] == ["summary.json"]


@pytest.mark.faults
def test_two_ranks_end_together_when_the_end_cannot_be_saved(tmp_path: Path, repository: Path, cache: Path, disk: Disk) -> None:
    room = disk("size=20m")
    ranks = ["hardware.gpus=2", "training.global_batch_tokens=1024", "training.max_steps=60"]
    command = [sys.executable, str(ROOT / "train.py"), f"data.repo={repository}", f"output.cache={cache}", *REQUEST, *ranks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def started() -> subprocess.Popen[str]:
        words = [*command, f"output.root={room}"]
        return subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process, deadline = started(), time.monotonic() + 200
    while not list(room.glob("*/*/checkpoints/step_*")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    fill(room)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2 and "Traceback" not in errors and errors.count("the run's end is not saved") == 1, errors
    (identity,) = room.glob("*/*/run.json")
    folder = RunFolder(identity.parent)
    last = checkpoint.latest(folder.checkpoints)
    assert last is not None and last.name < "step_000060" and not folder.finished
    (room / "ballast").unlink()
    (folder.path / "checkpoint_now").touch()
    process = started()
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0 and f"continuing the interrupted run in {folder.path}" in output, errors
    asked_for = f"step_{int(last.name.removeprefix('step_')) + 1:06d}"
    assert folder.finished and not (folder.path / "checkpoint_now").exists() and f"{asked_for} is on the disk" in " ".join(errors.split())
