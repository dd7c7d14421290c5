"""The learning-rate range test: a rate that rises exponentially, until the loss diverges (Smith 2017, arXiv:1506.01186).

The loss of a batch is held against the rate of the update just before it. Batches differ by more than a step changes, so from each loss is
taken by how much the untrained model found that batch harder than the average one. What is read off is this curve, smoothed by an
exponential mean with its bias taken out, over the logarithm of the rate:

    steepest    where it falls fastest (Smith 2017)
    valley      the middle of its longest descent, the safer choice (Howard & Gugger 2020, fastai's `valley`)
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from elite.mode_options import LrRangeConfig
from elite.training.step import DivergedError


@dataclass(frozen=True)
class Sweep:
    """What was seen. Losses in nats a token."""

    rates: list[float]
    losses: list[float]
    """Of the first batch after the update at each rate."""
    untrained: list[float]
    """Of the same batches before anything was trained."""
    corrected: list[float]
    """Losses as if all batches were as hard."""
    smoothed: list[float]
    stopped: str
    """Why it ended."""

    @property
    def steepest(self) -> float | None:
        """The rate at which the loss falls fastest; None if it never falls."""
        falling = self._falling
        if len(falling) < 2:
            return None
        slopes = np.gradient(np.array(falling), np.log(self.rates[: len(falling)]))
        place = int(slopes.argmin())
        return self.rates[place] if slopes[place] < 0 else None

    @property
    def valley(self) -> float | None:
        """The rate in the middle of the longest descent; None if the loss never falls."""
        descent = longest_descent(self._falling)
        return self.rates[(descent[0] + descent[-1]) // 2] if len(descent) > 1 else None

    @property
    def _falling(self) -> list[float]:
        """The curve up to its lowest point: what comes down after a leap says nothing of a run that begins at such a rate."""
        return self.smoothed[: self.smoothed.index(min(self.smoothed)) + 1] if self.smoothed else []

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self) | {"steepest": self.steepest, "valley": self.valley}


def rates_of(config: LrRangeConfig) -> list[float]:
    """The rate of every step, from the lowest to the highest by one factor."""
    low, high = math.log(config.lowest), math.log(config.highest)
    return [math.exp(low + (high - low) * step / (config.steps - 1)) for step in range(config.steps)]


def sweep(step: Callable[[float], float], untrained: Sequence[float], config: LrRangeConfig) -> Sweep:
    """Train at rising rates.

    Args:
        step: one optimizer step at a rate; returns the loss before its update.
        untrained: what the loss of each step's batch is before the first one.
    """
    rates, average = rates_of(config), sum(untrained) / len(untrained)
    seen: list[float] = []
    corrected: list[float] = []
    smoothed: list[float] = []
    mean, stopped = 0.0, "highest rate"
    for number, rate in enumerate(rates):
        try:
            loss = step(rate)
        except DivergedError as error:
            stopped = f"diverged: {error.problem}"
            break
        if number == 0:
            continue
        seen.append(loss)
        corrected.append(loss - untrained[number] + average)
        mean = config.smoothing * mean + (1 - config.smoothing) * corrected[-1]
        smoothed.append(mean / (1 - config.smoothing ** len(seen)))
        if smoothed[-1] > config.divergence * min(smoothed):
            stopped = f"diverged: loss {smoothed[-1]:.4g}, lowest {min(smoothed):.4g}"
            break
    return Sweep(rates[: len(seen)], seen, list(untrained[1 : len(seen) + 1]), corrected, smoothed, stopped)


def longest_descent(values: Sequence[float]) -> list[int]:
    """Indices of the longest strictly falling subsequence (patience sorting, Fredman 1975)."""
    tops: list[float] = []
    places: list[int] = []
    before: list[int | None] = []
    for index, value in enumerate(values):
        pile = bisect_left(tops, -value)
        tops[pile : pile + 1] = [-value]
        places[pile : pile + 1] = [index]
        before.append(places[pile - 1] if pile else None)
    found: list[int] = []
    place = places[-1] if places else None
    while place is not None:
        found.append(place)
        place = before[place]
    return found[::-1]
