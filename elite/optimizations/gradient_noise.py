"""Gradient noise.

What:   Gaussian noise on every gradient, less from step to step.
How:    before clipping all together, N(0, σ²) is added to each value, σ² = η / (1 + t)^γ at step t = 0, 1 … The noise is drawn from
        the run's seed and the step, so all ranks add the same and a run that continues adds what it would have. It has the length
        σ √parameters: with many parameters the paper's η, made for a few thousand, drowns the gradient.
Memory: the largest gradient once more, in the update.
Source: Neelakantan et al. 2015, arXiv:1511.06807.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.parts import FP32
from elite.optimizations.shapes import largest_trained
from elite.optimizations.targets import LoopBuild


class GradientNoise(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        eta: float = 0.01
        """η: variance at the first step; the paper's smallest."""
        gamma: float = 0.55
        """γ: how fast the variance falls."""

        def __post_init__(self) -> None:
            require("gradient_noise.eta", self.eta, 0 < self.eta < float("inf"), "must be positive and finite")
            require("gradient_noise.gamma", self.gamma, 0 <= self.gamma < float("inf"), "must not be negative, and finite")

    name = "gradient_noise"
    title = "gradient noise"
    row = 24
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.GRADIENT_NOISE})
    source = "Neelakantan et al. 2015"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return replace(step, optimizer_workspace=max(step.optimizer_workspace, FP32 * largest_trained(facts)))

    def apply(self, target: LoopBuild) -> Applied:
        from elite.optimizations.functions.gradients import Noise

        hook = Noise(self.name, self.config.eta, self.config.gamma, target.seed)
        return Applied(len(target.parameters), "gradients", target.add(hook))
