"""Validation: the loss on held-out files with the repository before them, and without."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elite.data.batches import IGNORE, Batch
from elite.distributed.exchange import exchange_of
from elite.distributed.ranks import Ranks
from elite.distributed.watchdog import Beat, no_beat
from elite.executor.contract import Executor


@dataclass(frozen=True)
class Validator:
    """Scores the same held-out tokens each time it is called.

    Args:
        with_context: one row each: repository, then target; labels on the target only.
        alone: the same targets without what stands before them.
        beat: told before each row.
    """

    executor: Executor
    with_context: Sequence[Batch]
    alone: Sequence[Batch]
    ranks: Ranks
    beat: Beat = no_beat

    @property
    def longest(self) -> int:
        """Tokens of the longest pass."""
        return max((batch.input_ids.numel() for batch in (*self.with_context, *self.alone)), default=0)

    def __call__(self) -> dict[str, float]:
        """`val_loss` and `val_loss_alone`, nats a token; their difference is what the context is worth."""
        return {"val_loss": self._mean(self.with_context), "val_loss_alone": self._mean(self.alone)}

    @torch.no_grad()
    def _mean(self, batches: Sequence[Batch]) -> float:
        model = self.executor.model
        training = model.training
        model.eval()
        total, tokens = 0.0, 0
        try:
            for batch, counts in exchange_of(model).dealt(batches, self.ranks):
                self.beat("a validation row")
                scored = (batch.labels != IGNORE).any(0).nonzero()[:, 0].to(self.ranks.device)
                loss = self.executor.loss_sum(batch.to(self.ranks.device), keep=scored).item()
                total += loss * counts
                tokens += batch.label_tokens * counts
        finally:
            # Memory may run out here and the run go on.
            model.train(training)
        return self.ranks.sum(total) / self.ranks.sum(float(tokens))
