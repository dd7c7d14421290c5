"""What acts around the steps of a run: the parts that stage `loop` adds, called by the loop in their declared order."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from elite.stability import Verdict


class Hook:
    """Something that acts between steps; what it does not override does nothing.

    What it keeps is part of every checkpoint, so that a run that continues ends as one that was never interrupted.
    """

    name: str
    """Of the optimization that added it, or of what else did."""

    def begin(self) -> None:
        """Before the first step of this process, after what a checkpoint holds has been read."""

    def accumulating(self) -> AbstractContextManager[None]:
        """Within, gradients are added up, in a way that can be done again: nothing of the run changes, and no other process waits."""
        return nullcontext()

    def yields(self) -> bool:
        """Memory ran out within `accumulating`: whether the hook has kept some back, and gives it up now for the rest of the run."""
        return False

    def gradients(self, parameters: Sequence[Any], step: int) -> None:
        """After gradients are whole and unscaled, before they are clipped together.

        Args:
            parameters: all that is trained; one without a gradient has None.
            step: number of the step at work, from 1.
        """

    def judge(self, step: int, loss: float) -> Verdict:
        """When the gradients of `step` are there and its update is not.

        Args:
            loss: of the global batch, nats a token, finite; the same on all ranks.
        """
        return Verdict.take

    def may_rewind(self) -> bool:
        """Whether `judge` may ask for a rewind; there must be a checkpoint to go back to then."""
        return False

    def sets_rate(self, step: int) -> bool:
        """Whether the learning rate after `step` is this hook's to set; the run's schedule stands still then."""
        return False

    def stepped(self, step: int) -> None:
        """After the optimizer's step, and the schedule's; also after a step that was skipped, which changed no weights."""

    def validated(self, step: int, losses: dict[str, float]) -> bool:
        """After a validation, the one before the first step included; True asks for the end of the run."""
        return False

    def evaluating(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that are validated and exported."""
        return nullcontext()

    def exports(self) -> str:
        """What `evaluating` puts in place of the trained weights, in words; empty: nothing."""
        return ""

    def metrics(self) -> dict[str, float]:
        """What this step's line of `metrics.jsonl` says besides."""
        return {}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that a checkpoint keeps. All ranks call it at once, and rank 0's is kept."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""

    def counts(self) -> dict[str, float]:
        """What acted how often in this run, for its summary."""
        return {}
