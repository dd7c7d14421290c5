"""What every executor offers."""

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
