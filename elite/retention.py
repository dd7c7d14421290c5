"""Which checkpoints of a run stay on disk: the last, the best by validation loss, milestones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay; `training.checkpoint_every` says when one is written."""

    keep_best: int = 1
    """So many with the lowest validation loss stay, besides the last."""
    milestone_every: int = 0
    """Checkpoints of steps that this divides are written and stay for good; 0: none do."""

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of this step stays whatever comes after it."""
        return self.milestone_every > 0 and step > 0 and step % self.milestone_every == 0


def among_best(losses: Mapping[int, float | None], count: int) -> set[int]:
    """The steps with the lowest losses, `count` of them at most; of equal losses the earlier step's counts as lower."""
    ranked = sorted((loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss))
    return {step for _, step in ranked[:count]}


def kept(losses: Mapping[int, float | None], last: int, config: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints stay.

    Args:
        losses: validation loss, in nats, of every step that has a checkpoint; None where the step was not validated.
        last: the newest one, which a run continues from.
    """
    return {last} | {step for step in losses if config.is_milestone(step)} | among_best(losses, config.keep_best)
