"""Constants of the allocator and of CUDA's context, and what they come from: `calibration.json`.

`python -m elite.bench.calibrate --fit FILE …` writes it.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Slack:
    """What is reserved beyond what is allocated."""

    share: float
    """Of what is allocated."""
    rounding_bytes: float
    source: str
    """Measurement, or assumption."""


@dataclass(frozen=True)
class Ahead:
    """What is taken ahead beyond what is allocated: shares of it that most steps stay below, by executor."""

    whole: float
    streamed: float
    source: str


@dataclass(frozen=True)
class Context:
    """What the driver counts beside torch's allocator."""

    bytes: float
    source: str


@dataclass(frozen=True)
class Calibration:
    """Every constant of `calibration.json`."""

    blocks: Slack
    pages: Slack
    least: Slack
    """In pages, once all that can be given back has been: gaps smaller than a page."""
    ahead: Ahead
    context: Context


@lru_cache
def calibration() -> Calibration:
    """The constants as they stand."""
    return read(FILE)


def read(file: Path) -> Calibration:
    """What `write` wrote."""
    plain = json.loads(file.read_text())
    slacks = {name: Slack(**plain[name]) for name in ("blocks", "pages", "least")}
    return Calibration(**slacks, ahead=Ahead(**plain["ahead"]), context=Context(**plain["context"]))


def write(made: Calibration, file: Path = FILE) -> None:
    """Keep constants for the plans to come."""
    file.write_text(json.dumps(asdict(made), indent=1) + "\n")
    calibration.cache_clear()
