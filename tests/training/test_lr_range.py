"""The range test against problems whose answer is known, and what is read off its curve against plain searches."""

import math
import random
from itertools import pairwise

import pytest

from elite.config import LrRangeConfig
from elite.training.lr_range import Sweep, longest_descent, rates_of, sweep
from elite.training.step import DivergedError

CURVATURE = 4.0


def descent(config: LrRangeConfig, noise: list[float] | None = None) -> Sweep:
    """Gradient descent on ½·4·x² from x = 1, plus what each batch adds: it diverges above a rate of 2 / 4."""
    place, number = 1.0, -1
    added = noise or [1.0] * config.steps

    def step(rate: float) -> float:
        nonlocal place, number
        number += 1
        loss = CURVATURE / 2 * place**2 + added[number]
        place -= rate * CURVATURE * place
        return loss

    return sweep(step, [CURVATURE / 2 + extra for extra in added], config)


def test_rates_rise_by_one_factor() -> None:
    rates = rates_of(LrRangeConfig(lowest=1e-5, highest=10.0, steps=31))
    assert len(rates) == 31 and rates[0] == pytest.approx(1e-5) and rates[-1] == pytest.approx(10.0)
    assert all(b / a == pytest.approx(10 ** (6 / 30)) for a, b in pairwise(rates))


def test_it_stops_where_descent_diverges_and_suggests_less() -> None:
    found = descent(LrRangeConfig(lowest=1e-4, highest=10.0, steps=120, smoothing=0.0))
    assert found.stopped.startswith("diverged") and len(found.rates) < 119
    assert found.steepest is not None and found.valley is not None
    # By then the loss is all but gone; above 2 / 4 it grows.
    assert 1e-3 < found.steepest < 0.5 and 1e-4 < found.valley < 0.5 < found.rates[-1]
    # Each loss is that after the update at its rate.
    place = 1.0
    for rate, loss in zip(found.rates, found.losses, strict=True):
        place -= rate * CURVATURE * place
        assert loss == pytest.approx(CURVATURE / 2 * place**2 + 1.0)


def test_a_range_that_goes_well_ends_at_its_highest_rate() -> None:
    found = descent(LrRangeConfig(lowest=1e-4, highest=0.2, steps=50))
    assert found.stopped == "highest rate" and len(found.rates) == len(found.losses) == len(found.smoothed) == 49


def test_hard_batches_do_not_matter() -> None:
    config = LrRangeConfig(lowest=1e-4, highest=0.2, steps=60, smoothing=0.5)
    noise = [random.Random(step).uniform(0, 5) for step in range(config.steps)]
    noisy, plain = descent(config, noise), descent(config)
    average = sum(noise) / len(noise)
    assert noisy.corrected == pytest.approx([loss - 1 + average for loss in plain.losses])
    assert noisy.steepest == plain.steepest and noisy.valley == pytest.approx(plain.valley)
    assert max(abs(a - b) for a, b in zip(noisy.losses, noisy.corrected, strict=True)) > 1


def test_smoothing_is_a_mean_without_bias() -> None:
    found = descent(LrRangeConfig(lowest=1e-4, highest=0.2, steps=12, smoothing=0.7))
    for last, mean in enumerate(found.smoothed):
        weights = [0.7 ** (last - index) for index in range(last + 1)]
        assert mean == pytest.approx(sum(w * v for w, v in zip(weights, found.corrected, strict=False)) / sum(weights))


def test_a_loss_that_is_not_finite_ends_it() -> None:
    losses = iter([3.0, 2.9, 2.8, 2.6])

    def step(rate: float) -> float:
        for loss in losses:
            return loss
        raise DivergedError("loss nan, gradient norm nan: not finite")

    found = sweep(step, [3.0] * 10, LrRangeConfig(steps=10))
    assert found.losses == [2.9, 2.8, 2.6] and "not finite" in found.stopped and found.valley == found.rates[1]


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    found = sweep(lambda rate: 10.0 + math.log10(rate), [1.0] * 5, LrRangeConfig(steps=5))
    assert found.steepest is None and found.valley is None
    assert Sweep([], [], [], [], [], "").steepest is None and Sweep([], [], [], [], [], "").valley is None


def test_what_falls_after_a_leap_does_not_count() -> None:
    smoothed = [3.0, 2.9, 2.5, 2.4, 9.0, 7.0, 5.0, 4.0, 3.5, 3.0]
    rates = rates_of(LrRangeConfig(steps=10))
    found = Sweep(rates, smoothed, smoothed, smoothed, smoothed, "")
    assert found.steepest == rates[1], "central differences"
    assert found.valley == rates[1]


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_descent_is_the_longest(seed: int) -> None:
    draw = random.Random(seed)
    values = [draw.choice(range(12)) + 0.0 for _ in range(draw.randrange(1, 25))]
    best = [1] * len(values)
    for i in range(len(values)):
        best[i] = 1 + max((best[j] for j in range(i) if values[j] > values[i]), default=0)
    found = longest_descent(values)
    assert len(found) == max(best) and found == sorted(found)
    assert all(values[a] > values[b] for a, b in pairwise(found))
