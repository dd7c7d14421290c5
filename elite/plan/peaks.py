"""What the allocator reserves for what a step allocates, and what the driver then shows in use. Bytes.

    reserved     allocated · (1 + slack) + rounding, at most what the device grants: torch gives cached memory back before it gives up
    device use   reserved + context

Slack and rounding are the allocator's, in blocks of fixed sizes or, with `memory_pool`, in pages. The context is CUDA's, with kernels and
what libraries take themselves. The constants stand in `elite/hardware/calibration.json`.
"""

from dataclasses import dataclass

from elite.facts import Device
from elite.hardware.calibration import calibration
from elite.optimizations.contract import Decision, Site


@dataclass(frozen=True)
class Peaks:
    """Of one device, beside what is allocated."""

    reserved_bytes: float
    device_bytes: float


def may_be_held_up(allocated_bytes: float, decisions: tuple[Decision, ...], device: Device) -> bool:
    """Whether blocks of fixed sizes may leave no room for what would fit: what is freed is given back only where all of a block is free."""
    if device.kind != "cuda" or _paged(decisions):
        return False
    known = calibration().blocks
    return allocated_bytes * (1 + known.share) + known.rounding_bytes > device.memory_usable_bytes


def _paged(decisions: tuple[Decision, ...]) -> bool:
    return any(decision.active and Site.ALLOCATOR in decision.optimization.claims for decision in decisions)


def peaks(allocated_bytes: float, decisions: tuple[Decision, ...], device: Device) -> Peaks | None:
    """Both peaks for what is allocated at the step's peak; None on a CPU, which has neither allocator nor context."""
    if device.kind != "cuda":
        return None
    known = calibration()
    slack = known.pages if _paged(decisions) else known.blocks
    reserved = allocated_bytes * (1 + slack.share) + slack.rounding_bytes
    reserved = min(reserved, max(allocated_bytes, device.memory_usable_bytes))
    return Peaks(reserved, reserved + known.context.bytes)
