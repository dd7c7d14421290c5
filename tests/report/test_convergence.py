"""The fitted loss curve: it finds a limit that is known, its interval means what it says, and it knows when to be silent."""

import numpy as np
import pytest

from elite.report.convergence import LEAST_STEPS, LEVEL, estimate


def curve(kind: str, noise: float, seed: int, steps: int = 400, limit: float = 1.8) -> tuple[list[float], list[float]]:
    """Tokens and losses that tend to `limit`."""
    random = np.random.default_rng(seed)
    t = np.arange(1, steps + 1) * 65536.0
    share = t / t[-1]
    fall = 0.35 * share**-0.4 if kind == "power law" else 2.5 * np.exp(-share / 0.2)
    return t.tolist(), (limit + fall + noise * random.standard_normal(steps)).tolist()


@pytest.mark.parametrize("kind", ["power law", "exponential"])
def test_it_recovers_a_curve_without_noise(kind: str) -> None:
    found = estimate(*curve(kind, 0.0, 0))
    assert found.limit and found.doubled and found.family == kind
    assert found.limit.value == pytest.approx(1.8, abs=0.03)
    expected = 1.8 + (0.35 * 2**-0.4 if kind == "power law" else 2.5 * np.exp(-2 / 0.2))
    assert found.doubled.value == pytest.approx(expected, abs=0.01)
    assert found.curve[-1][1] == pytest.approx(1.8 + (0.35 if kind == "power law" else 2.5 * np.exp(-5)), abs=0.01)


@pytest.mark.parametrize("kind", ["power law", "exponential"])
def test_its_interval_holds_the_limit_about_as_often_as_it_says(kind: str) -> None:
    found = [estimate(*curve(kind, 0.08, seed)).limit for seed in range(25)]
    held = [limit is not None and limit.low <= 1.8 <= limit.high for limit in found]
    assert np.mean(held) >= LEVEL - 0.15


def test_more_noise_is_less_certain() -> None:
    def width(noise: float) -> float:
        limit = estimate(*curve("power law", noise, 3)).limit
        assert limit
        return limit.high - limit.low

    assert width(0.01) < width(0.05) < width(0.3)


def test_what_says_nothing_is_not_fitted() -> None:
    tokens, losses = curve("power law", 0.05, 0, steps=LEAST_STEPS - 1)
    assert "too few steps" in estimate(tokens, losses).missing and estimate(tokens, losses).limit is None
    tokens, losses = curve("power law", 0.05, 0)
    assert estimate(tokens, losses[::-1]).missing == "the loss does not fall"
    assert "too few" in estimate(tokens, [float("nan")] * len(losses)).words


def test_the_same_run_gives_the_same_estimate() -> None:
    assert estimate(*curve("exponential", 0.1, 1)) == estimate(*curve("exponential", 0.1, 1))
