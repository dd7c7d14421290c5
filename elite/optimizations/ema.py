"""Exponential moving average of the weights.

What:   beside the weights that are trained, their average over the past; validation and export see the average.
How:    torch's AveragedModel over what is trained, after every step: average ← d · average + (1 - d) · weights. It begins with the
        weights before the first step; with `warmup`, d = min(decay, (1 + n) / (10 + n)) at the n-th step, so that those are soon
        forgotten. Training itself is as without. `final/` holds the average, a checkpoint's `model/` the trained weights.
Memory: the average, 4 bytes a trained parameter, in checkpoints too.
Source: Polyak & Juditsky 1992; torch.optim.swa_utils; the warm-up is TensorFlow's.
"""

from dataclasses import dataclass
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild


class EMA(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        decay: float = 0.999
        """Share of the average that stays at a step; it looks back over about 1 / (1 - decay) steps."""
        warmup: bool = True
        """Look back less far in the first steps."""

        def __post_init__(self) -> None:
            require("ema.decay", self.decay, 0 < self.decay < 1, "must lie in (0, 1)")

    name = "ema"
    title = "exponential moving average of weights"
    row = 15
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.EVALUATED_WEIGHTS})
    source = "Polyak & Juditsky 1992"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step.beside_trained(facts)

    def apply(self, target: LoopBuild) -> Applied:
        from elite.optimizations.functions.averages import ExponentialAverage

        hook = ExponentialAverage(self.name, target.parameters, self.config.decay, self.config.warmup)
        return Applied(len(target.parameters), "averaged parameters", target.add(hook))
