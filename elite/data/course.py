"""How a curriculum leads the stream of sequences: as a pure function of how many have been dealt, so that it resumes and ranks agree.

Competence (Platanios et al. 2019, arXiv:1903.09848): with t of the T steps that it takes to open the whole corpus, and c₀ at the start,

    linear    c = c₀ + (1 - c₀) · t / T
    root      c = √(c₀² + (1 - c₀²) · t / T)

of the corpus is open, the easiest first (Bengio et al. 2009). A draw takes any open sequence that this round has not dealt yet; what opens
meanwhile joins the round, and a round without any left begins anew with all that are open. Once all are, a round is an epoch.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from elite.curriculum import Pacing
from elite.data.packing import Sequence
from elite.plan.stages import ContextStage


@dataclass(frozen=True)
class Ramp:
    """Easy sequences first."""

    difficulty: Callable[[Sequence], float]
    start_fraction: float
    """Share of the corpus that is open at the first step."""
    pacing: Pacing
    full_step: float
    """Steps until all of it is."""

    def opened(self, step: int, sequences: int) -> int:
        """How many of so many sequences are open at a step; one at least."""
        share = min(1.0, step / self.full_step)
        start = self.start_fraction
        linear = start + (1 - start) * share
        competence = linear if self.pacing is Pacing.linear else math.sqrt(start**2 + (1 - start**2) * share)
        return max(1, min(sequences, math.ceil(competence * sequences)))


@dataclass(frozen=True)
class Course:
    """What a run's curriculum does to its stream."""

    step_sequences: int
    """Sequences of the tier's context in one optimizer step, all ranks together."""
    stages: tuple[ContextStage, ...] = ()
    """Contexts in turn; none leaves sequences whole."""
    ramp: Ramp | None = None

    def parts(self, dealt: int) -> int:
        """Rows that the next sequence is dealt as, after so many."""
        step = dealt // self.step_sequences
        return next((stage.parts for stage in reversed(self.stages) if step >= stage.first_step), 1)

    def before(self, epoch: int, sequences: int) -> int:
        """Sequences dealt before a round begins, of a corpus that has so many."""
        if self.ramp is None:
            return epoch * sequences
        dealt = 0
        for done in range(epoch):
            if self._opened(dealt, sequences) == sequences:
                return dealt + (epoch - done) * sequences
            dealt += self._round(dealt, sequences)
        return dealt

    def order(self, sequences: Seq[Sequence], dealt: int, rng: np.random.Generator) -> list[Sequence]:
        """The sequences of a round in the order in which they are dealt, after so many before it."""
        drawn = [sequences[position] for position in rng.permutation(len(sequences))]
        if self.ramp is None:
            return drawn
        # Sorted after they were drawn: equally difficult ones stay in an order of chance.
        ranked, waiting, order = sorted(drawn, key=self.ramp.difficulty), list[Sequence](), list[Sequence]()
        seen = 0
        for _ in range(self._round(dealt, len(sequences))):
            limit = self._opened(dealt + len(order), len(sequences))
            waiting += ranked[seen:limit]
            seen = limit
            chosen = int(rng.integers(len(waiting)))
            waiting[chosen], waiting[-1] = waiting[-1], waiting[chosen]
            order.append(waiting.pop())
        return order

    def _round(self, dealt: int, sequences: int) -> int:
        """Sequences in a round that begins after so many: until it has dealt all that are open by then."""
        count = self._opened(dealt, sequences)
        while count < (opened := self._opened(dealt + count, sequences)):
            count = opened
        return count

    def _opened(self, dealt: int, sequences: int) -> int:
        assert self.ramp is not None
        return self.ramp.opened(dealt // self.step_sequences, sequences)
