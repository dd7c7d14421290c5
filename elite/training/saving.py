"""Saving while training goes on: the state is copied, and one thread writes, verifies and prunes."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elite import checkpoint
from elite.model import TrainedCopy
from elite.retention import CheckpointConfig, kept

log = logging.getLogger("elite.training")

REQUEST = "checkpoint_now"
"""Who makes a file of this name in a run folder has a checkpoint written after the step at work."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    seconds: float
    unsaved: checkpoint.Unsaved | None
    """What kept it from the disk; None: it is there."""


class Saver:
    """Writes the checkpoints of a run, one at a time, under `folder`; on rank 0 alone.

    A disk that takes no more ends no run: that is said, what was saved before stays, and the next save tries again. Any other error is
    raised in the training thread, at the next call. As a context it waits for the save at work, however the run ends; only a second
    interrupt does not.
    """

    def __init__(self, folder: Path, keep: CheckpointConfig) -> None:
        self._folder, self._keep = folder, keep
        self._at_work: Future[Outcome] | None = None
        self._last: Outcome | None = None
        self._refused = False
        """The request cannot be removed; that has been said."""
        self._totals = {"checkpoint_blocked_s": 0.0, "checkpoint_s": 0.0}
        self._read = dict(self._totals)
        self._counts = {"checkpoints_saved": 0, "checkpoints_failed": 0}

    def save(
        self, step: int, val_loss: float | None, copied: Callable[[], TrainedCopy], state: dict[str, Any], asked: bool = False
    ) -> None:
        """Copy everything to host memory and return; a thread writes it. Waits for the save before, if that is at work.

        Args:
            val_loss: of this step, in nats; None if it was not validated.
            copied: copies what is trained.
            state: all but what is trained.
            asked: by a person, who is told when it is there.
        """
        began = time.perf_counter()
        self._wait()
        trained = copied()
        what = checkpoint.snapshot(step, trained.save, state, trained.nbytes, val_loss)
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._at_work = pool.submit(self._write, what, asked)
        pool.shutdown(wait=False)
        self._totals["checkpoint_blocked_s"] += time.perf_counter() - began

    def settle(self) -> checkpoint.Unsaved | None:
        """Wait until the last save is on the disk; what kept it from there."""
        began = time.perf_counter()
        self._wait()
        self._totals["checkpoint_blocked_s"] += time.perf_counter() - began
        return self._last.unsaved if self._last else None

    def asked(self) -> bool:
        """Whether somebody has asked for a checkpoint since the last call. The request is removed."""
        request = self._folder.parent / REQUEST
        if not request.exists():
            self._refused = False
            return False
        if self._refused:
            return False
        try:
            request.unlink()
        except OSError as error:
            self._refused = True
            log.warning("%s cannot be removed (%s): this is the only checkpoint it asks for", request, error.strerror)
        log.info("%s: saving after the step at work", REQUEST)
        return True

    def metrics(self) -> dict[str, float]:
        """Seconds since the last call: what training has waited for saving, and what the saves took that ended meanwhile."""
        if self._at_work is not None and self._at_work.done():
            self._wait()
        since = {name: total - self._read[name] for name, total in self._totals.items()}
        self._read = dict(self._totals)
        return since

    def totals(self) -> dict[str, float]:
        """The same figures of the whole run in this process, and how many saves ended well and not."""
        return {**self._totals, **self._counts}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._wait()
        elif self._at_work is not None and not issubclass(kind, KeyboardInterrupt):
            wait([self._at_work])
            failed = self._at_work.exception()
            if failed is not None:
                # What ended the run comes first.
                log.error("and the save at work failed: %s: %s", type(failed).__name__, failed)

    def _wait(self) -> None:
        if self._at_work is None:
            return
        at_work, self._at_work = self._at_work, None
        self._last = at_work.result()
        self._totals["checkpoint_s"] += self._last.seconds
        self._counts["checkpoints_failed" if self._last.unsaved else "checkpoints_saved"] += 1

    def _write(self, what: checkpoint.Snapshot, asked: bool) -> Outcome:
        """In the thread."""
        began, unsaved = time.perf_counter(), None
        try:
            path = checkpoint.write(self._folder, what)
        except checkpoint.Unsaved as error:
            unsaved = error
            log.warning("%s: %s; training goes on, and the next save tries again", error.problem, error.remedy)
        else:
            # Later steps are of a course that was left: the run went back behind them.
            losses = {step: loss for step, loss in checkpoint.losses(self._folder).items() if step <= what.step}
            checkpoint.prune(self._folder, kept(losses, what.step, self._keep))
            if asked:
                log.info("%s: %s is on the disk", REQUEST, path)
        return Outcome(time.perf_counter() - began, unsaved)
