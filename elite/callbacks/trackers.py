"""Experiment trackers by their own libraries, under one set of names: train/*, val/*, perf/*, mem/*."""

import netrc
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rich.console import Console

from elite.config import Logger, LoggerConfig
from elite.errors import LoggerError
from elite.training.loop import Observer

FIELDS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "context": "train/context",
    "skipped_steps": "train/skipped_steps",
    "spikes": "train/spikes",
    "rewinds": "train/rewinds",
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


class Tracker:
    """Hands records to a tracker's run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def step(self, record: dict[str, float]) -> None:
        self._run.log({"step": int(record["step"]), **tracked(record)})

    def validation(self, record: dict[str, float]) -> None:
        self._run.log({"step": int(record["step"]), **tracked(record)})

    def log(self, content: dict[str, Any]) -> None:
        """Hand over something else, under its own names."""
        self._run.log(content)

    def end(self, summary: dict[str, Any]) -> None:
        self._run.finish()


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
        return Tracker(starters[config.name](config, folder, name, run_id, settings, console))
    except Exception as error:
        # Whatever a tracker's library raises at start, it means one thing: what was asked for is not there.
        raise LoggerError(f"logger={config.name.value} does not start: {str(error).splitlines()[0]}", "mend it, or logger=none") from error


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


def _wandb(config: LoggerConfig, folder: Path, name: str, run_id: str, settings: dict[str, Any], console: Console) -> Any:
    import wandb

    mode = None if "WANDB_MODE" in os.environ or _has_wandb_key() else "offline"
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        name=name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=settings,
        mode=mode,  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("step")
    for prefix in ("train", "val", "perf", "mem"):
        run.define_metric(f"{prefix}/*", step_metric="step")
    if run.offline:
        console.print(f"W&B is offline; send the run later with: wandb sync {Path(run.dir).parent}")
    return run


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return file.is_file() and host in netrc.netrc(str(file)).hosts


def _trackio(config: LoggerConfig, folder: Path, name: str, run_id: str, settings: dict[str, Any], console: Console) -> Any:
    import trackio

    run = trackio.init(project=config.project, name=f"{name}-{run_id}", group=config.group, config=settings, resume="allow", embed=False)
    console.print(f"trackio keeps this run on this machine; see it with: trackio show --project {config.project}")
    return run
