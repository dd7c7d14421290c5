"""Fields of the configuration that one mode alone reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeConfig:
    """What `mode=probe` does."""

    steps: int = 0
    """Whole optimizer steps on random tokens, to hold the estimate against."""
    file: str | None = None
    """JSON file for the result."""


@dataclass(frozen=True)
class CalibrateConfig:
    """What `mode=calibrate` does."""

    count: int = 40
    """Configurations that are drawn."""
    seed: int = 2
    """Of the draw."""
    seconds: float | None = None
    """No configuration is begun later than this; a rerun goes on. Unset: all of them."""
    file: str = "calibration.json"
    """JSON file for the result."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What `mode=evaluate` does besides measuring the validation loss."""

    run: str | None = None
    """Run folder whose last weights are evaluated; unset: the base model, in a folder of its own."""
    files: int = 8
    """Held-out files that are continued from their middle; 0: none."""
    completions: int = 4
    """Continuations of each; a single one takes the likeliest token each time."""
    tokens: int = 48
    """Tokens of a continuation."""
    temperature: float = 0.2
    """Of several continuations, which are drawn."""


@dataclass(frozen=True)
class LrRangeConfig:
    """What `mode=lr_range` does."""

    lowest: float = 1e-6
    """Learning rate of the first step."""
    highest: float = 1.0
    """Of the last, unless the loss diverges before it."""
    steps: int = 100
    """Optimizer steps at most."""
    accumulation: int | None = None
    """Micro-batches in one of them; unset: as many as the run has."""
    smoothing: float = 0.8
    """Weight of the mean so far in the smoothed loss."""
    divergence: float = 2.0
    """It ends when the smoothed loss is so many times its lowest."""
