"""Validation: the loss on held-out files with the repository before them, and without."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elite.data.batches import IGNORE, Batch
from elite.distributed.exchange import Exchange
from elite.distributed.gradients import gradient_exchange
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
        sharing: brings the keys and values of rows that ranks share; unset: each has its own rows.
    """

    executor: Executor
    with_context: Sequence[Batch]
    alone: Sequence[Batch]
    ranks: Ranks
    beat: Beat = no_beat
    sharing: Exchange | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest pass."""
        return max((batch.input_ids.numel() for batch, _ in (*self._mine(self.with_context), *self._mine(self.alone))), default=0)

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
            for batch, counts in self._mine(batches):
                self.beat("a validation row")
                scored = (batch.labels != IGNORE).any(0).nonzero()[:, 0].to(self.ranks.device)
                loss = self.executor.loss_sum(batch.to(self.ranks.device), keep=scored).item()
                total += loss * counts
                tokens += batch.label_tokens * counts
        finally:
            # Memory may run out here and the run go on.
            model.train(training)
        return self.ranks.sum(total) / self.ranks.sum(float(tokens))

    def _mine(self, batches: Sequence[Batch]) -> list[tuple[Batch, bool]]:
        """What this rank scores, and whether it counts: its part of each row, where ranks share them; what is dealt to it of the others."""
        rank, world = self.ranks.rank, self.ranks.world
        # Each rank holds two pieces of a row.
        shared = [batch for batch in batches if self.sharing is not None and batch.context >= 2 * world]
        others = [batch for batch in batches if batch not in shared]
        dealt = gradient_exchange(self.executor.model).dealt(others, self.ranks)
        return [*((batch.shared(rank, world), True) for batch in shared), *dealt]
