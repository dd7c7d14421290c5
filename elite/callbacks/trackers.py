"""Experiment trackers by their own libraries, under one set of names: train/*, val/*, perf/*, mem/*."""

import netrc
import os
import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rich.console import Console

from elite.config import Logger, LoggerConfig
from elite.errors import LoggerError
from elite.training.loop import Observer

START_S = 20
"""How long W&B may take to begin a run before it is kept here alone."""
END_S = 120
"""How long it may take, when the run has ended, to send what is still here."""

FIELDS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "context": "train/context",
    "skipped_steps": "train/skipped_steps",
    "spikes": "train/spikes",
    "rewinds": "train/rewinds",
    "oom_recoveries": "train/oom_recoveries",
    "val_loss": "val/loss",
    "val_loss_alone": "val/loss_alone",
    "tokens_per_s": "perf/tokens_per_s",
    "tflops": "perf/tflops",
    "mfu": "perf/mfu",
    "step_time_s": "perf/step_time_s",
    "checkpoint_blocked_s": "perf/checkpoint_blocked_s",
    "checkpoint_s": "perf/checkpoint_s",
    "gpu_peak_bytes": "mem/gpu_peak_gib",
    "gpu_reserved_bytes": "mem/gpu_reserved_gib",
    "host_rss_bytes": "mem/host_rss_gib",
    "defragmentation_allocated_bytes": "mem/defragmentation_allocated_gib",
    "defragmentation_before_bytes": "mem/defragmentation_before_gib",
    "defragmentation_after_bytes": "mem/defragmentation_after_gib",
}


def tracked(record: dict[str, float]) -> dict[str, float]:
    """A metrics line under the trackers' names; memory in GiB, which people read."""
    return {FIELDS[key]: value / 2**30 if key.endswith("_bytes") else value for key, value in record.items() if key in FIELDS}


@dataclass(frozen=True)
class Session:
    """A run that a tracker's library has begun."""

    run: Any
    """Of the library: has `log` and `finish`."""
    later: str
    """How what has not been handed over is had all the same."""
    errors: tuple[type[Exception], ...]
    """What the library raises where it cannot take something."""


class Tracker:
    """Hands records to a tracker's run. One that fails is told no more, and the run goes on: `metrics.jsonl` has everything.

    Args:
        name: of the tracker, for people.
    """

    def __init__(self, name: str, session: Session, console: Console) -> None:
        self._name, self._session, self._console = name, session, console
        self.failed = False
        """Whether it has refused something."""

    def step(self, record: dict[str, float]) -> None:
        self.log({"step": int(record["step"]), **tracked(record)})

    def validation(self, record: dict[str, float]) -> None:
        self.log({"step": int(record["step"]), **tracked(record)})

    def log(self, content: dict[str, Any]) -> None:
        """Hand over something else, under its own names."""
        self._unless_it_fails(lambda: self._session.run.log(content))

    def end(self, summary: dict[str, Any]) -> None:
        self._unless_it_fails(self._session.run.finish)

    def _unless_it_fails(self, hand_over: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            hand_over()
        except self._session.errors as error:
            self.failed = True
            said = first_line(error)
            self._console.print(f"{self._name} takes no more ({said}); the run goes on without it. {self._session.later}", markup=False)


def start_tracker(
    config: LoggerConfig, folder: Path, name: str, run_id: str, settings: dict[str, Any], console: Console
) -> Observer | None:
    """Start the tracker that was asked for, or none.

    Args:
        run_id: the same for a resumed run, so that it continues there too.
        settings: the resolved configuration and what the plan decided.

    Raises:
        LoggerError: it does not start.
    """
    starters = {Logger.wandb: _wandb, Logger.trackio: _trackio}
    if config.name is Logger.none:
        return None
    try:
        return Tracker(config.name.value, starters[config.name](config, folder, name, run_id, settings, console), console)
    except Exception as error:
        # Whatever a tracker's library raises at start, it means one thing: what was asked for is not there.
        raise LoggerError(f"logger={config.name.value} does not start: {first_line(error)}", "mend it, or logger=none") from error


def log_table(config: LoggerConfig, folder: Path, group: str, columns: list[str | int], rows: list[list[Any]]) -> None:
    """Add a run `summary` with this table to a multirun's group in W&B.

    Raises:
        LoggerError: W&B does not start.
    """
    import wandb

    name = f"{group}-summary"
    tracker = start_tracker(replace(config, name=Logger.wandb, group=group), folder, name, uuid.uuid4().hex[:8], {}, Console())
    assert isinstance(tracker, Tracker)
    # A column of W&B's has one type: what is not a number is text.
    tracker.log({"jobs": wandb.Table(columns=columns, data=[[_cell(value) for value in row] for row in rows], allow_mixed_types=True)})
    tracker.end({})


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _wandb(config: LoggerConfig, folder: Path, name: str, run_id: str, settings: dict[str, Any], console: Console) -> Session:
    import wandb

    def begun(mode: str | None) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=settings,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off", init_timeout=START_S, finish_timeout=END_S, finish_timeout_raises=True),
        )

    try:
        run = begun(None if "WANDB_MODE" in os.environ or _has_wandb_key() else "offline")
    except wandb.errors.AuthenticationError:
        # A key that is refused is a mistake to mend, not an outage.
        raise
    except wandb.errors.CommError as error:
        console.print(f"W&B cannot be reached ({first_line(error)})", markup=False)
        # Its service process still holds the run's id.
        wandb.teardown()
        run = begun("offline")
    run.define_metric("step")
    for prefix in ("train", "val", "perf", "mem"):
        run.define_metric(f"{prefix}/*", step_metric="step")
    later = f"wandb sync {Path(run.dir).parent}"
    if run.offline:
        console.print(f"W&B is offline; send the run later with: {later}")
    return Session(run, f"Send what it has with: {later}", (wandb.errors.Error, OSError))


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return file.is_file() and host in netrc.netrc(str(file)).hosts


def _trackio(config: LoggerConfig, folder: Path, name: str, run_id: str, settings: dict[str, Any], console: Console) -> Session:
    import trackio

    run = trackio.init(project=config.project, name=f"{name}-{run_id}", group=config.group, config=settings, resume="allow", embed=False)
    console.print(f"trackio keeps this run on this machine; see it with: trackio show --project {config.project}")
    return Session(run, "metrics.jsonl has everything", (OSError, sqlite3.Error))
