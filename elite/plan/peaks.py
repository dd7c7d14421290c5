"""What the allocator reserves for what a step allocates, and what the driver then shows in use. Bytes.

    reserved     taken ahead, in one piece that the step's tensors are cut from (`plan.take_ahead`):
                     allocated · (1 + share) + left behind
                 else what torch's allocator comes to by itself:
                     allocated · (1 + slack) + left behind + rounding, at most what the device grants: torch gives cached memory back
                     before it gives up
                 near the device's limit less: what leaves the headroom, or if gaps need more (`GAPS`), all that they do
    needed       allocated · (1 + least) + rounding: gaps that torch's allocator cannot give back are not there for tensors
    device use   reserved + context

Left behind are logits in half precision: once they are there in fp32 they are freed, and what follows is too large for their place.
Slack and rounding are the allocator's, in blocks of fixed sizes or, with `memory_pool` and for what is taken ahead, in pages; the share is
what most steps stayed below in one piece. The context is CUDA's, with kernels and what libraries take themselves. The constants stand in
`elite/hardware/calibration.json`.
"""

from dataclasses import dataclass

from elite.config import Executor, PlanConfig
from elite.facts import Device, Facts
from elite.hardware.calibration import calibration
from elite.optimizations.contract import Decision, Site
from elite.optimizations.parts import FP32
from elite.plan.memory import folded

GAPS = 0.07
"""Share of what is allocated that is taken for gaps in any case, as far as the device has it: as much as a step that had less came to
(calibration_eleventh.json, no. 19)."""


@dataclass(frozen=True)
class Peaks:
    """Of one device, beside what is allocated."""

    ahead_bytes: float
    """Taken before the first step; 0 where nothing is."""
    reserved_bytes: float
    device_bytes: float


def needed_bytes(allocated_bytes: float, device: Device) -> float:
    """The least that has to be reserved for what is allocated: with less a step runs out of memory. On a CPU nothing is beyond."""
    least = calibration().least
    return allocated_bytes * (1 + least.share) + least.rounding_bytes if device.kind == "cuda" else allocated_bytes


def may_be_held_up(allocated_bytes: float, decisions: tuple[Decision, ...], device: Device) -> bool:
    """Whether blocks of fixed sizes may leave no room for what would fit: what is freed is given back only where all of a block is free."""
    if device.kind != "cuda" or _paged(decisions):
        return False
    known = calibration().blocks
    return allocated_bytes * (1 + known.share) + known.rounding_bytes > device.memory_usable_bytes


def _paged(decisions: tuple[Decision, ...]) -> bool:
    return any(decision.active and Site.ALLOCATOR in decision.optimization.claims for decision in decisions)


def peaks(allocated_bytes: float, facts: Facts, decisions: tuple[Decision, ...], executor: Executor, asked: PlanConfig) -> Peaks | None:
    """Both peaks for what is allocated at the step's peak; None on a CPU, which has neither allocator nor context."""
    device, known = facts.device, calibration()
    if device.kind != "cuda":
        return None
    usable, left = device.memory_usable_bytes, left_behind(facts, decisions, executor)
    most, ahead = max(allocated_bytes, usable), 0.0
    if asked.take_ahead:
        share = known.ahead.whole if executor is Executor.whole else known.ahead.streamed
        enough = allocated_bytes * (1 + share) + left
        # The headroom is for what is not modelled, and gaps are.
        free = usable * (1 - asked.headroom_fraction)
        ahead = reserved = min(enough, max(free, min(usable, allocated_bytes * (1 + GAPS))))
    else:
        slack = known.pages if _paged(decisions) else known.blocks
        reserved = allocated_bytes * (1 + slack.share) + left + slack.rounding_bytes
    reserved = min(reserved, most)
    return Peaks(ahead, reserved, reserved + known.context.bytes)


def left_behind(facts: Facts, decisions: tuple[Decision, ...], executor: Executor) -> float:
    """Logits in half precision that nobody needs once they are there in fp32."""
    step = folded(facts, decisions)
    if executor is not Executor.whole or step.loss_tile is not None or step.value == FP32:
        return 0.0
    return float(step.value * facts.micro_tokens * facts.model.vocab_size)
