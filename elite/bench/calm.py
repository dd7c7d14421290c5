"""Cores that nobody else uses just now.

Machines that are lent share their cores: what runs beside one takes up to half of its speed, for a second or for minutes, and each core by
itself. Whoever times the host's work moves to a core that is fast at the moment, and looks again afterwards.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

COUNT = 15_000
"""Of a loop of some 0.7 ms."""
TRIES = 2
CALM = 1.12
"""Time of that loop over the shortest so far, up to which a core is nobody else's."""


class CalmCores:
    """The cores this thread may use, and which of them it uses while others are busy elsewhere."""

    def __init__(self) -> None:
        # A system without affinities keeps its thread where it is.
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._here: int | None = None
        self._shortest = _loop_s()

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Within, this thread stays where `settle` puts it; afterwards it may go anywhere again."""
        try:
            yield
        finally:
            if self._cores:
                os.sched_setaffinity(0, self._cores)

    def settle(self) -> bool:
        """Move to a calm core: the present one if it still is. False where there is none."""
        for core in [*(c for c in self._cores if c == self._here), *(c for c in self._cores if c != self._here)]:
            os.sched_setaffinity(0, {core})
            self._here = core
            if self.calm():
                return True
        return not self._cores and self.calm()

    def calm(self) -> bool:
        """Whether nobody else slows this core."""
        taken = min(_loop_s() for _ in range(TRIES))
        self._shortest = min(self._shortest, taken)
        return taken <= CALM * self._shortest


def _loop_s() -> float:
    began, x = time.perf_counter(), 0
    for i in range(COUNT):
        x += i * i
    return time.perf_counter() - began
