"""Loss-spike detection.

What:   a batch whose loss stands far above what came before it is not learned from.
How:    before the update the step's loss is held against the last `window` losses that steps were taken with. Above their median by more
        than `threshold` robust deviations, 1.4826 · MAD (the standard deviation, if they were normal), it is a spike. `action=skip` passes
        the batch; `rewind` goes back to the last checkpoint and passes the batches since (PaLM). Fewer than `minimum` losses, or losses
        without any spread, judge nothing. A loss that is not finite is not this part's: see `stability.non_finite`.
Memory: nothing.
Source: Chowdhery et al. 2022 (PaLM), section 5.1; OLMo-core flags six deviations over 128 steps; Rousseeuw & Croux 1993 (MAD).
"""

import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.hooks import Hook
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild
from elite.stability import Verdict

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class Action(Enum):
    """What a spike leads to."""

    skip = "skip"
    rewind = "rewind"


class LossSpikeDetection(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        action: Action = Action.skip
        window: int = 128
        """Losses that the next one is held against."""
        minimum: int = 16
        """Fewer of them judge nothing."""
        threshold: float = 6.0
        """Robust deviations above the median."""

        def __post_init__(self) -> None:
            require("loss_spike_detection.minimum", self.minimum, self.minimum >= 3, "must be at least 3: fewer have no spread")
            rule = f"must be at least loss_spike_detection.minimum ({self.minimum})"
            require("loss_spike_detection.window", self.window, self.window >= self.minimum, rule)
            require("loss_spike_detection.threshold", self.threshold, 0 < self.threshold < float("inf"), "must be positive and finite")

    name = "loss_spike_detection"
    title = "loss-spike detection"
    row = 17
    stage = Stage.loop
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.STEP_TAKEN})
    source = "Chowdhery et al. 2022; OLMo-core"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: LoopBuild) -> Applied:
        judged = max(0, target.steps - self.config.minimum)
        undo = target.add(SpikeDetector(self.config))
        return Applied(judged, f"of {target.steps} steps are judged by their loss, {self.config.action.value} a spike", undo)


class SpikeDetector(Hook):
    """Keeps the losses of the last steps that were taken."""

    name = LossSpikeDetection.name

    def __init__(self, config: Any) -> None:
        self._config: LossSpikeDetection.Config = config
        self._window: deque[float] = deque(maxlen=config.window)
        self._judged = 0

    def judge(self, step: int, loss: float) -> Verdict:
        limit = self.limit()
        self._judged += limit < float("inf")
        if loss > limit:
            return Verdict[self._config.action.value]
        self._window.append(loss)
        return Verdict.take

    def limit(self) -> float:
        """The loss above which the next step is a spike; infinite where nothing can be judged."""
        if len(self._window) < self._config.minimum:
            return float("inf")
        median = statistics.median(self._window)
        deviation = NORMAL * statistics.median(abs(loss - median) for loss in self._window)
        return median + self._config.threshold * deviation if deviation else float("inf")

    def may_rewind(self) -> bool:
        return self._config.action is Action.rewind

    def state(self) -> dict[str, Any]:
        return {"window": list(self._window), "judged": self._judged}

    def load_state(self, state: dict[str, Any]) -> None:
        self._window = deque(state["window"], maxlen=self._config.window)
        self._judged = state["judged"]

    def counts(self) -> dict[str, float]:
        return {"judged": self._judged}
