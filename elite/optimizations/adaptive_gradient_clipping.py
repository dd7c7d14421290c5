"""Adaptive gradient clipping.

What:   the gradient of a unit is shortened where it is long against the unit's own weights.
How:    before clipping all together: where ‖G_i‖ > λ max(‖W_i‖, ε), G_i becomes λ max(‖W_i‖, ε) G_i / ‖G_i‖; a unit i is a row of a matrix
        (what one output reads), or a whole vector. A B of LoRA begins at zero, so there ε sets the limit.
Memory: a few values a row at a time.
Source: Brock et al. 2021, arXiv:2102.06171, equation 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild


class AdaptiveGradientClipping(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        clipping: float = 0.01
        """λ: longest gradient as a share of the weights' length."""
        eps: float = 1e-3
        """ε: least length that weights count with."""

        def __post_init__(self) -> None:
            for option, value in (("clipping", self.clipping), ("eps", self.eps)):
                require(f"adaptive_gradient_clipping.{option}", value, 0 < value < float("inf"), "must be positive and finite")

    name = "adaptive_gradient_clipping"
    title = "adaptive gradient clipping"
    row = 34
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.UNIT_GRADIENT_NORM})
    source = "Brock et al. 2021"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: LoopBuild) -> Applied:
        from elite.optimizations.functions.gradients import AdaptiveClipping

        hook = AdaptiveClipping(self.name, self.config.clipping, self.config.eps, target.device)
        return Applied(len(target.parameters), "gradients, unit by unit", target.add(hook))
