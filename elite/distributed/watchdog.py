"""The watchdog: a process that no longer moves is ended, and says where it stood.

What:   a rank that hangs (a disk that does not answer, a collective whose other side is gone) would hold its machine for days.
How:    the trainer gives a sign of life at every micro-batch, validation row and checkpoint, the streamed executor at every chunk of every
        layer. A thread counts its own seconds between two signs. Where they exceed the deadline, the stacks of all threads go to
        `hang_rank<r>.txt` in the run folder and to stderr, the reason to the folder's last words, and the process ends; the launcher
        then ends the other ranks, and the same command continues from the last checkpoint.

Seconds are counted, not read off a clock: a process that was stopped (SIGSTOP, a frozen container, a machine asleep) has not hung.
The thread needs Python's interpreter: a library that hangs while holding its lock is not noticed.
"""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from elite.distributed.launch import HUNG, leave_last_words
from elite.distributed.ranks import Ranks
from elite.vigilance import WatchdogConfig

Beat = Callable[[str], None]
"""A sign of life; told what begins."""

LEAST_MINUTES = 30.0
STEPS = 5
"""So many planned steps may pass without a sign of life: plans are off, and a step without one is a whole executor's single pass."""
POLLS = 20
"""Looks of the thread until the deadline, which is kept to one of them."""
LONGEST_POLL_S = 10.0


def no_beat(where: str) -> None:
    """Where nobody watches."""


def deadline_seconds(config: WatchdogConfig, step_s: float) -> float:
    """Seconds without a sign of life that are a hang; 0 watches nothing.

    Args:
        step_s: of a planned optimizer step.
    """
    if config.minutes is not None:
        return config.minutes * 60
    return max(LEAST_MINUTES * 60, STEPS * step_s)


class Watchdog:
    """Watches from entry to exit; called, it takes note of a sign of life.

    Args:
        folder: of the run.
        end: ends the process with an exit code, at once: what hangs would not let an exception through.
    """

    def __init__(self, folder: Path, ranks: Ranks, deadline_s: float, end: Callable[[int], object] = os._exit) -> None:
        self._folder, self._ranks, self._deadline_s, self._end = folder, ranks, deadline_s, end
        self.report = folder / f"hang_rank{ranks.rank}.txt"
        self._signs, self._where = 0, "its start"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __call__(self, where: str) -> None:
        # Two plain stores: this is called for every chunk of every layer.
        self._where = where
        self._signs += 1

    def __enter__(self) -> "Watchdog":
        # Of an earlier start in this folder.
        self.report.unlink(missing_ok=True)
        if self._deadline_s > 0:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._deadline_s > 0:
            self._thread.join()

    def _watch(self) -> None:
        poll_s = min(LONGEST_POLL_S, self._deadline_s / POLLS)
        seen, silent_s = self._signs, 0.0
        while not self._over.wait(poll_s):
            silent_s = silent_s + poll_s if self._signs == seen else 0.0
            seen = self._signs
            if silent_s >= self._deadline_s:
                self._ended()
                return

    def _ended(self) -> None:
        reason = f"no sign of life for {self._deadline_s / 60:g} minutes since {self._where} began; stacks in {self.report.name}"
        with self.report.open("w") as file:
            file.write(f"rank {self._ranks.rank} of {self._ranks.world}: {reason}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        leave_last_words(self._folder, reason)
        sys.stderr.write(f"rank {self._ranks.rank}: {reason}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._end(HUNG)
