"""What the allocator reserves for what a step allocates, and what the driver then shows in use. Bytes.

    reserved     allocated · (1 + slack) + rounding, at most what the device grants: torch gives cached memory back before it gives up
    device use   reserved + context

Slack and rounding are the allocator's, in blocks of fixed sizes or, with `memory_pool`, in pages. The context is CUDA's, with kernels and
what libraries take themselves. These constants and what they come from stand in `calibration.json`, which
`python -m elite.bench.calibrate --fit FILE …` writes.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from elite.facts import Device
from elite.optimizations.contract import Decision, Site

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
class Context:
    """What the driver counts beside torch's allocator."""

    bytes: float
    source: str


@dataclass(frozen=True)
class Calibration:
    """Every constant of `calibration.json`."""

    blocks: Slack
    pages: Slack
    context: Context


@dataclass(frozen=True)
class Peaks:
    """Of one device, beside what is allocated."""

    reserved_bytes: float
    device_bytes: float


@lru_cache
def calibration() -> Calibration:
    """The constants as they stand."""
    return read(FILE)


def read(file: Path) -> Calibration:
    """What `write` wrote."""
    plain = json.loads(file.read_text())
    return Calibration(Slack(**plain["blocks"]), Slack(**plain["pages"]), Context(**plain["context"]))


def write(made: Calibration, file: Path = FILE) -> None:
    """Keep constants for the plans to come."""
    file.write_text(json.dumps(asdict(made), indent=1) + "\n")
    calibration.cache_clear()


def peaks(allocated_bytes: float, decisions: tuple[Decision, ...], device: Device) -> Peaks | None:
    """Both peaks for what is allocated at the step's peak; None on a CPU, which has neither allocator nor context."""
    if device.kind != "cuda":
        return None
    paged = any(decision.active and Site.ALLOCATOR in decision.optimization.claims for decision in decisions)
    known = calibration()
    slack = known.pages if paged else known.blocks
    reserved = allocated_bytes * (1 + slack.share) + slack.rounding_bytes
    reserved = min(reserved, max(allocated_bytes, device.memory_usable_bytes))
    return Peaks(reserved, reserved + known.context.bytes)
