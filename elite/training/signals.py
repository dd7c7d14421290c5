"""A signal asks a run to end: the step at work is finished and saved; a second one ends the process at once."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""From a person, a scheduler or the system, a terminal that is closed; Slurm's warning is either of the last two, as asked for."""
ECHO_S = 1.0
"""Signals within so long of the first are the same one: a scheduler sends it to every process, and the launcher passes its own on."""


class StopRequest:
    """Within it, signals are noted rather than obeyed."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0: none."""
        self._came_at = 0.0
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # What the parent ignores stays ignored: nohup does so with the terminal's end.
        heard = [number for number in REQUESTS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number == 0:
            self.number, self._came_at = number, now
        elif now - self._came_at > ECHO_S:
            # Not an exception: whoever asks twice does not wait for anything to be tidied up.
            os._exit(128 + number)
