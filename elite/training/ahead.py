"""The device's memory taken before the first step, in one piece, as the plan says."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from elite.optimizations.hooks import Hook

SMALL_BYTES = 1024**2
"""Up to here a tensor is small to torch's allocator, and lies apart: it is not cut from the piece (kSmallSize, c10/cuda)."""


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

    def begin(self) -> None:
        # What loading has left in pieces would count twice.
        torch.cuda.empty_cache()
        there = torch.cuda.memory_reserved(self._device)
        state = 0.0 if self._optimizer.state else self._taking.optimizer_bytes
        # torch's takes the roots of all second moments at once.
        small = small_to_come(self._parameters, state, roots=isinstance(self._optimizer, torch.optim.AdamW))
        missing = int(self._taking.reserved_bytes - there - small)
        if missing > 0 and _take(missing, self._device):
            self._taken = torch.cuda.memory_reserved(self._device) - there
        torch.cuda.reset_peak_memory_stats(self._device)

    def counts(self) -> dict[str, float]:
        return {"ahead_bytes": float(self._taken)}


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


def _take(missing: int, device: torch.device) -> bool:
    """Whether the device had so much."""
    try:
        piece = torch.empty(missing, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    del piece
    return True
