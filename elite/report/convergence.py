"""Where a training loss is heading: a curve fitted to what was seen, and how far that can be trusted.

    loss(t) = a + b · t^-c    or    a + b · exp(-t / c)        t: tokens seen, a: what the loss tends to; a, b ≥ 0

Given c both are linear in a and b, so the least squares are exact for each c of a grid and the best of the grid is taken (variable
projection: Golub and Pereyra 1973). The interval comes from resampling the residuals in blocks (Künsch 1989), because neighbouring steps
are not independent; each resample chooses its own family, so that not knowing the family counts as well.

A schedule that lowers the learning rate at the end bends the curve in a way that neither family has: the estimate is one of this run
going on as it did, not of another run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEAST_STEPS = 30
"""Fewer say nothing about a limit."""
POINTS = 120
"""Averages of neighbouring steps that are fitted at most."""
RESAMPLES = 300
LEVEL = 0.9
"""Share of resamples inside the interval."""
FORMS = {"power law": np.geomspace(0.05, 4.0, 1000), "exponential": np.geomspace(0.02, 4.0, 1000)}
"""Families, and the values of c that are tried; t counts from 0 to 1 over the run."""


@dataclass(frozen=True)
class Bounded:
    """A value and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Convergence:
    """What can be said of a loss that was seen so far."""

    missing: str
    """Why there is no estimate; empty if there is one."""
    family: str = ""
    tokens: float = 0.0
    """Seen so far."""
    limit: Bounded | None = None
    """What the loss tends to."""
    doubled: Bounded | None = None
    """Loss after as many tokens again."""
    curve: tuple[tuple[float, float], ...] = ()
    """Tokens, and the fitted loss, for drawing."""

    @property
    def words(self) -> str:
        """In one line."""
        if self.missing:
            return f"no estimate: {self.missing}"
        return f"training loss tends to {self.limit} ({self.family}); after as many tokens again {self.doubled}; {LEVEL:.0%} intervals"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, without the drawing."""
        return {name: value for name, value in asdict(self).items() if name != "curve"} | {"words": self.words}


@dataclass(frozen=True)
class _Fit:
    """The best member of both families for each of B curves: arrays [B]."""

    a: np.ndarray
    b: np.ndarray
    form: np.ndarray
    """Index into all (family, c)."""

    def at(self, shapes: np.ndarray) -> np.ndarray:
        """Losses [T, B], given `_shapes` [forms, T]."""
        return self.a + self.b * shapes[self.form].T


def estimate(tokens: Sequence[float], losses: Sequence[float], seed: int = 0) -> Convergence:
    """Fit one run's training losses.

    Args:
        tokens: seen after each step, rising.
        losses: of each step; those that are not finite are left out.
        seed: of the resampling, so that a report can be made again.
    """
    seen = [(float(t), float(loss)) for t, loss in zip(tokens, losses, strict=True) if np.isfinite(loss)]
    if len(seen) < LEAST_STEPS:
        return Convergence(f"too few steps ({len(seen)}, at least {LEAST_STEPS})")
    last = float(seen[-1][0])
    parts = np.array_split(np.array(seen), min(POINTS, len(seen)))
    t, y = np.array([part.mean(axis=0) for part in parts]).T
    # Averaged as the losses are: the mean of a curve is not its value at the mean.
    shapes = np.stack([_shapes(part[:, 0] / last).mean(axis=1) for part in parts], axis=1)
    best = _fitted(shapes, y[:, None])
    if best.b[0] == 0:
        return Convergence("the loss does not fall")
    fit = best.at(shapes)[:, 0]
    resampled = _fitted(shapes, _resamples(y, fit, np.random.default_rng(seed)))
    tails = np.array([0.5 - LEVEL / 2, 0.5 + LEVEL / 2])

    def bounded(values: np.ndarray, drawn: np.ndarray) -> Bounded:
        low, high = np.quantile(drawn, tails)
        return Bounded(float(values[0]), min(float(low), float(values[0])), max(float(high), float(values[0])))

    twice = _shapes(np.array([2.0]))
    return Convergence(
        missing="",
        family=_names()[int(best.form[0])],
        tokens=last,
        limit=bounded(best.a, resampled.a),
        doubled=bounded(best.at(twice)[0], resampled.at(twice)[0]),
        curve=tuple(zip(t.tolist(), fit.tolist())),
    )


def _names() -> list[str]:
    return [name for name, values in FORMS.items() for _ in values]


def _shapes(t: np.ndarray) -> np.ndarray:
    """What b is multiplied with, [forms, T], for every family and c."""
    power = t[None, :] ** -FORMS["power law"][:, None]
    return np.concatenate([power, np.exp(-t[None, :] / FORMS["exponential"][:, None])])


def _fitted(shapes: np.ndarray, y: np.ndarray) -> _Fit:
    """Least squares of every form [forms, T] to every column of `y` [T, B], with a and b not below 0."""
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    b = np.maximum(centred @ y / (centred**2).sum(axis=1, keepdims=True), 0.0)
    a = y.mean(axis=0) - b * shapes.mean(axis=1, keepdims=True)
    through_zero = np.maximum(shapes @ y / (shapes**2).sum(axis=1, keepdims=True), 0.0)
    b, a = np.where(a < 0, through_zero, b), np.maximum(a, 0.0)
    # Σ (y - a - b·s)², multiplied out: [forms, B] without a third axis.
    squares = (y**2).sum(axis=0) + len(y) * a**2 + b**2 * (shapes**2).sum(axis=1, keepdims=True)
    squares += 2 * (a * b * shapes.sum(axis=1, keepdims=True) - a * y.sum(axis=0) - b * (shapes @ y))
    form = squares.argmin(axis=0)
    columns = np.arange(y.shape[1])
    return _Fit(a[form, columns], b[form, columns], form)


def _resamples(y: np.ndarray, fit: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The fit with blocks of its residuals put elsewhere, [T, RESAMPLES]."""
    count = len(y)
    residuals = (y - fit) * np.sqrt(count / (count - 3))
    length = max(2, round(count ** (1 / 3)))
    starts = random.integers(count, size=(-(-count // length), RESAMPLES))
    places = (starts[:, None, :] + np.arange(length)[None, :, None]).reshape(-1, RESAMPLES)[:count] % count
    return fit[:, None] + residuals[places]
