"""The device's memory taken before the first step, in one piece, as the plan says, and held to while gradients are added up.

A tensor that finds no room between others would extend the piece, although enough of it is free in gaps: what is reserved would go beyond
the plan by what one order of tensors or another happens to leave. Held, torch's allocator first gives the pages of all gaps back to the
device, and then takes as many where the tensor lies. That costs time, and only where it happens (`alloc_retries`); what is allocated is
the same. A step whose tensors take more than was planned is not lost to that: the first time it fails, the hold is given up and the step
done again as it is (elite/training/recovery.py).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elite.optimizations.hooks import Hook

SMALL_BYTES = 1024**2
"""Up to here a tensor is small to torch's allocator, and lies apart: it is not cut from the piece (kSmallSize, c10/cuda)."""

PAGE_BYTES = 20 * 1024**2
"""By which a segment that grows does so (kLargeBuffer, c10/cuda)."""
MOST_PIECES = 4
"""Taken one after the other."""
SPARE = 0.02
"""Share of what is planned by which gaps may extend what is reserved. Small, for the plan is off by as much then; not nothing, for what is
allocated is planned to within about as much."""


@dataclass(frozen=True)
class Taking:
    """How much is taken."""

    reserved_bytes: float
    """All that is to be reserved then, weights included; 0: nothing is taken ahead."""
    optimizer_bytes: float
    """Of them, what the optimizer's state will take."""

    @classmethod
    def of(cls, ahead_bytes: float, memory: dict[str, float]) -> "Taking":
        """As a plan says it."""
        return cls(ahead_bytes, memory["optimizer_state"])


class Ahead(Hook):
    """Takes what is missing and gives it back to the allocator, which keeps it for the steps.

    Where another process has too much of the device for that, memory is taken as steps come to need it. In segments that grow, what a
    step needs beyond extends the piece; a block of fixed size would stand beside it, and its gaps be lost.

    Args:
        parameters: all that is trained.
    """

    name = "take_ahead"

    def __init__(self, taking: Taking, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], device: torch.device) -> None:
        self._taking, self._optimizer, self._parameters, self._device = taking, optimizer, parameters, device
        self._taken = 0
        self._held_bytes = 0.0
        self._retries = 0

    def begin(self) -> None:
        # What loading has left in pieces would count twice.
        torch.cuda.empty_cache()
        there = torch.cuda.memory_reserved(self._device)
        state = 0.0 if self._optimizer.state else self._taking.optimizer_bytes
        # torch's takes the roots of all second moments at once.
        small = small_to_come(self._parameters, state, roots=isinstance(self._optimizer, torch.optim.AdamW))
        # Loading leaves room between small tensors, too, which none but small ones can have.
        target = int(self._taking.reserved_bytes - max(0.0, small - self._small_room()))
        if target > there and _take(target, self._device):
            self._taken = torch.cuda.memory_reserved(self._device) - there
            self._held_bytes = self._taking.reserved_bytes * (1 + SPARE)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._retries = alloc_retries(self._device)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        if not self._held_bytes:
            yield
            return
        # A card that is smaller than this one is held to as well.
        before = torch.cuda.get_per_process_memory_fraction(self._device)
        share = self._held_bytes / torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(before, share), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self._device)

    def yields(self) -> bool:
        held, self._held_bytes = self._held_bytes, 0.0
        return held > 0

    def counts(self) -> dict[str, float]:
        return {"ahead_bytes": float(self._taken), "alloc_retries": float(alloc_retries(self._device) - self._retries)}

    def _small_room(self) -> float:
        """Bytes that are reserved for small tensors already and that none has."""
        stats = torch.cuda.memory_stats(self._device)
        return float(stats.get("reserved_bytes.small_pool.current", 0) - stats.get("allocated_bytes.small_pool.current", 0))


def alloc_retries(device: torch.device) -> int:
    """Times that torch's allocator has given back all gaps so far; on a CPU there are none."""
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else 0


def small_to_come(parameters: Iterable[nn.Parameter], state_bytes: float, *, roots: bool) -> float:
    """Bytes of small tensors that steps will add: each gradient, as much again while the optimizer is at work, and its state.

    Args:
        state_bytes: of the optimizer's state, two tensors a parameter.
        roots: the optimizer takes as much as a gradient while it is at work, and not nothing.
    """
    sizes = [parameter.nbytes for parameter in parameters]
    # ZeRO-3 leaves nothing of them here between steps.
    share = state_bytes / max(1, sum(sizes)) / 2
    gradients = sum(size for size in sizes if size <= SMALL_BYTES)
    return (2 if roots else 1) * gradients + sum(2 * size * share for size in sizes if size * share <= SMALL_BYTES)


def _take(target: int, device: torch.device) -> bool:
    """Whether the device had enough for so much to be reserved."""
    pieces = list[Tensor]()
    try:
        # A piece begins in what is left of the last page, so that less is reserved for it than its size.
        while len(pieces) < MOST_PIECES and (missing := target - torch.cuda.memory_reserved(device)) >= PAGE_BYTES:
            pieces.append(torch.empty(missing, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        return bool(pieces)
    return True
