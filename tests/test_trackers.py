"""Trackers that cannot be reached or that fail: the run goes on, and says how to send what it has. With W&B's real library."""

import io
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from elite.callbacks import metrics_file, trackers
from elite.callbacks.trackers import Session, Tracker, start_tracker
from elite.config import Logger, LoggerConfig
from elite.errors import LoggerError
from tests.conftest import Program
from tests.test_run import only_run, wandb_history

UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "x" * 40}
"""Nobody listens at the port `discard`."""
LINE = {"step": 1.0, "loss": 6.25, "lr": 1e-4}


def printing() -> tuple[Console, io.StringIO]:
    said = io.StringIO()
    return Console(file=said, width=1000), said


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.mark.faults
def test_an_unreachable_server_leaves_the_run_offline(unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "START_S", 3)
    console, said = printing()
    began = time.monotonic()
    tracker = start_tracker(LoggerConfig(), tmp_path, "run", "abcd1234", {}, console)
    assert tracker is not None and time.monotonic() - began < 20
    tracker.step(LINE)
    tracker.end({})
    words = said.getvalue()
    assert "W&B cannot be reached" in words and words.count("wandb sync") == 1
    folder = Path(words[words.index("wandb sync") :].split()[2])
    (kept,) = folder.glob("*.wandb")
    assert {key: value for key, value in wandb_history(kept)[-1].items() if key.startswith("train/")} == {
        "train/loss": 6.25,
        "train/lr": 1e-4,
    }


@pytest.mark.faults
def test_a_service_that_dies_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    console, said = printing()
    tracker = start_tracker(LoggerConfig(), tmp_path, "run", "abcd5678", {}, console)
    assert tracker is not None
    tracker.step(LINE)
    service = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("wandb-core")]
    assert service
    for child in service:
        child.kill()
    psutil.wait_procs(service, timeout=10)
    deadline = time.monotonic() + 10
    while "takes no more" not in said.getvalue() and time.monotonic() < deadline:
        tracker.step(LINE)
        time.sleep(0.05)
    tracker.validation({"step": 1, "val_loss": 6.0, "val_loss_alone": 6.0})
    tracker.end({})
    words = said.getvalue()
    assert words.count("wandb takes no more") == 1 and "the run goes on without it" in words and "wandb sync" in words
    import wandb

    # The service is gone for good: what other tests start is another one.
    with pytest.raises(OSError):
        wandb.teardown()


class Failing:
    """A tracker's run that raises."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def log(self, content: dict[str, Any]) -> None:
        """Raises."""
        self.calls += 1
        raise self.error

    def finish(self) -> None:
        """Raises."""
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("error", [OSError("No space left on device\nsecond line"), TimeoutError()])
def test_what_a_library_raises_switches_its_tracker_off(error: Exception) -> None:
    console, said = printing()
    run = Failing(error)
    tracker = Tracker("trackio", Session(run, "metrics.jsonl has everything", (OSError,)), console)
    tracker.step(LINE)
    tracker.step(LINE)
    tracker.end({})
    assert run.calls == 1 and len(said.getvalue().splitlines()) == 1 and "second line" not in said.getvalue()


def test_a_defect_of_ours_is_not_taken_for_an_outage() -> None:
    tracker = Tracker("wandb", Session(Failing(TypeError("not a number")), "", (OSError,)), Console(file=io.StringIO()))
    with pytest.raises(TypeError):
        tracker.step(LINE)


def test_a_key_that_is_refused_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refused(**_: Any) -> Any:
        raise wandb.errors.AuthenticationError("The API key you provided is either invalid or missing.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(LoggerError, match="logger=wandb does not start: The API key"):
        start_tracker(LoggerConfig(name=Logger.wandb), tmp_path, "run", "id", {}, Console(file=io.StringIO()))


@pytest.mark.faults
def test_a_whole_run_without_its_tracker_server(program: Program, tmp_path: Path) -> None:
    began = time.monotonic()
    done = program("debug=tiny", "logger=wandb", "training.completion_tokens=0", environment=UNREACHABLE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    folder = only_run(tmp_path)
    assert folder.finished and "W&B cannot be reached" in done.stdout and "wandb sync" in done.stdout
    assert [line["step"] for line in metrics_file.read(folder.metrics) if "loss" in line] == [1, 2, 3]
    (kept,) = (folder.path / "wandb").glob("offline-run-*/*.wandb")
    assert any("train/loss" in line for line in wandb_history(kept))
    print(f"{time.monotonic() - began:.0f} s")
