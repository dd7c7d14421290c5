"""What becomes of an optimizer step whose numbers are bad: options, and the verdicts on a step."""

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """On a step whose gradients are there and whose update is not. Of several the gravest holds: the last in this order."""

    take = "take"
    skip = "skip"
    """The batch is passed: weights, optimizer and loss scale stay. The step counts as one of the schedule."""
    rewind = "rewind"
    """Back to the last checkpoint; the data goes on behind this batch."""
    stop = "stop"
    """The run ends with an error, before this batch."""

    @property
    def gravity(self) -> int:
        """Place in that order, from 0."""
        return list(Verdict).index(self)


class NonFinite(Enum):
    """What a loss or gradient that is not finite leads to."""

    stop = "stop"
    skip = "skip"
    rewind = "rewind"


@dataclass(frozen=True)
class StabilityConfig:
    """What a run does about steps with bad numbers. Loss spikes are found by `optimizations.loss_spike_detection`."""

    non_finite: NonFinite = NonFinite.skip
    """`stop` ends the run, `skip` passes the batch, `rewind` goes back to the last checkpoint and passes the batches since."""
    max_skips: int = 10
    """Steps in a row that may be skipped; one more ends the run."""
    max_rewinds: int = 3
    """Rewinds to one checkpoint; one more ends the run."""
