"""The largest micro-batch that memory holds, by measurement: training.micro_batch=auto.

Bytes grow with the number of sequences along a straight line, nearly: what is resident, plus so much a sequence. The search begins with
the plan's answer, draws the line through what it measured (a secant step) and tries where the line meets the limit; where it has a
size that does not fit, it stays between that and the largest that does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from elite.training.trial import Trial

PROBES = 8
"""Passes at most."""
TOLERANCE = 0.05
"""The answer may be this share below the true largest."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    largest: int
    """Sequences; 0 if not even one fits."""
    proven: bool
    """Whether no larger one by more than the tolerance can fit; else the probes were used up."""
    limit_bytes: float
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def find(probe: Callable[[int], Trial], guess: int, most: int, limit_bytes: float) -> Found:
    """Search between one sequence and `most`.

    Args:
        probe: tries a number of sequences.
        guess: where to begin.
        limit_bytes: what must not be exceeded.
    """
    trials, low, high = list[Trial](), 0, most + 1
    size = max(1, min(guess, most))
    while True:
        trials.append(probe(size))
        if trials[-1].fits(limit_bytes):
            low = size
        else:
            high = size
        proven = high - 1 <= low / (1 - TOLERANCE)
        if proven or len(trials) == PROBES:
            return Found(low, proven, limit_bytes, tuple(trials))
        # With the last probe something must be found.
        size = 1 if low == 0 and len(trials) == PROBES - 1 else _next_size(trials, low, high, limit_bytes)


def _next_size(trials: list[Trial], low: int, high: int, limit_bytes: float) -> int:
    """The next number of sequences to try, strictly between `low`, the largest that fits, and `high`, the smallest that does not."""
    if low == 0:
        return high // 2
    points = {0: trials[0].resident_bytes} | {trial.sequences: trial.peak_bytes for trial in trials if trial.fits(limit_bytes)}
    *_, near, far = sorted(points)
    slope = (points[far] - points[near]) / (far - near)
    meets = int(far + (limit_bytes - points[far]) / slope) if slope > 0 else high - 1
    if meets >= high:
        # The line says that what failed would fit.
        return (low + high) // 2
    # Where the line says that this is the largest, the smallest that would be too far off has to fail.
    return min(high - 1, max(meets, int(low / (1 - TOLERANCE)) + 1))
