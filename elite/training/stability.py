"""What becomes of steps with bad numbers: judged before the update, alike on all ranks, and counted."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

from elite.distributed.ranks import Ranks
from elite.optimizations.hooks import Hook
from elite.stability import StabilityConfig, Verdict
from elite.training.step import DivergedError

log = logging.getLogger("elite.training")

GENTLER = "a lower training.learning_rate is a new run"
COUNTERS = ("skipped_steps", "spikes", "rewinds")
"""Told at each step."""


@dataclass
class Setbacks:
    """What went wrong in a run and was overcome; a rewind does not take it back."""

    skipped_steps: int = 0
    """Steps of the schedule without an update."""
    skipped_tokens: int = 0
    """Token slots of all batches whose gradients are not in the weights: skipped, or undone by a rewind."""
    non_finite: int = 0
    """Losses or gradients that were not finite."""
    spikes: int = 0
    """Losses that were finite and too high."""
    rewinds: int = 0
    skipped_in_a_row: int = 0
    rewound_to: int = -1
    """Step of the checkpoint that the last rewind went back to."""
    rewinds_in_place: int = 0
    """Rewinds to that checkpoint."""

    def counters(self) -> dict[str, float]:
        """What each line of `metrics.jsonl` says."""
        return {name: getattr(self, name) for name in COUNTERS}

    def counts(self) -> dict[str, int]:
        """What a run's summary says."""
        return {name: getattr(self, name) for name in ("skipped_steps", "skipped_tokens", "non_finite", "spikes", "rewinds")}

    def adopt(self, other: "Setbacks") -> None:
        """Take over another's."""
        for field in fields(Setbacks):
            setattr(self, field.name, getattr(other, field.name))


def judged(
    state: Setbacks,
    config: StabilityConfig,
    hooks: Sequence[Hook],
    ranks: Ranks,
    step: int,
    loss: float,
    norm: float,
    fit: bool,
) -> Verdict:
    """What becomes of step `step`, the same on all ranks; counted in `state`.

    Args:
        loss: of the global batch, nats a token.
        norm: of the gradient, before clipping.
        fit: both are finite, or the loss scaler deals with it.

    Raises:
        DivergedError: the run must end. Nothing has been updated, and the step is not counted.
    """
    asked = [hook.judge(step, loss) for hook in hooks] if fit else [Verdict[config.non_finite.value]]
    gravity = int(ranks.max(float(max((verdict.gravity for verdict in asked), default=0))))
    verdict = list(Verdict)[gravity]
    numbers = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}, {'a spike' if fit else 'not finite'}"
    if verdict is Verdict.stop:
        raise DivergedError(numbers, f"the same command with stability.non_finite=skip passes such batches; {GENTLER}")
    if verdict is Verdict.skip and state.skipped_in_a_row >= config.max_skips:
        problem = f"{numbers}, as in {state.skipped_in_a_row} steps before it that were skipped"
        raise DivergedError(problem, f"the same command with stability.max_skips={2 * config.max_skips + 1} goes on; {GENTLER}")
    if verdict is Verdict.take:
        state.skipped_in_a_row = 0
        return verdict
    state.non_finite += not fit
    state.spikes += fit
    if verdict is Verdict.skip:
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
    if ranks.is_main:
        log.warning("%s: %s", numbers, "skipped" if verdict is Verdict.skip else "back to the last checkpoint")
    return verdict


def rewound(state: Setbacks, config: StabilityConfig, step: int) -> None:
    """Count a rewind to the checkpoint of `step`.

    Raises:
        DivergedError: there were too many; that checkpoint is the last good state.
    """
    state.rewinds_in_place = state.rewinds_in_place + 1 if state.rewound_to == step else 1
    state.rewound_to = step
    if state.rewinds_in_place > config.max_rewinds:
        problem = f"{config.max_rewinds} rewinds to the checkpoint of step {step} have not helped"
        raise DivergedError(problem, f"the same command with stability.max_rewinds={2 * config.max_rewinds} goes on; {GENTLER}")
    state.rewinds += 1
