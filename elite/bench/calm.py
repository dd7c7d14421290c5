"""Cores that nobody else uses just now.

Rented machines share their cores: what runs beside one takes much of its speed, for a second or for minutes, and each core by itself
(`host_pace` in calibration_sixth.json). Whoever times the host's work moves to a core that is fast at the moment.
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

    def settle(self) -> None:
        """Move to a calm core, the present one if it still is; where there is none, to the least busy."""
        taken = dict[int, float]()
        for core in [*(c for c in self._cores if c == self._here), *(c for c in self._cores if c != self._here)]:
            self._move(core)
            taken[core] = min(_loop_s() for _ in range(TRIES))
            self._shortest = min(self._shortest, taken[core])
            if taken[core] <= CALM * self._shortest:
                return
        if taken:
            self._move(min(taken, key=lambda core: taken[core]))

    def _move(self, core: int) -> None:
        os.sched_setaffinity(0, {core})
        self._here = core


def _loop_s() -> float:
    began, x = time.perf_counter(), 0
    for i in range(COUNT):
        x += i * i
    return time.perf_counter() - began
