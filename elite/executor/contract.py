"""What every executor offers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from elite.data.batches import Batch


class Executor(Protocol):
    """Carries out forward passes whose result has a gradient."""

    model: nn.Module
    """What is trained; possibly wrapped by DDP."""

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Sum of the token losses in nats, fp32 scalar.

        Args:
            batch: on the model's device.
            keep: positions [T] that are scored; None scores all. Validation scores the end of a long context.
        """


class StepCut(Exception):
    """A step was asked to stop and did so before its end; what it has done is on disk, and it goes on from there.

    Args:
        step: its number, from 1.
    """


class StepJournal(Protocol):
    """Keeps the progress of long steps (training.mid_step_checkpoint)."""

    def begin(self, step: int, window: Sequence[Batch], scale: float, stopping: Callable[[], bool]) -> None:
        """Before a step, or before it is tried again: take up what is kept of it; passes raise `StepCut` once `stopping` says so.

        Args:
            step: its number, from 1.
            window: its micro-batches.
            scale: of the loss.
        """

    def end(self) -> None:
        """Once a checkpoint after the step is on disk: nothing has to be kept of it any more."""
