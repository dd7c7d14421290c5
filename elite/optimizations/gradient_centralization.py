"""Gradient centralization.

What:   the gradient of every weight matrix loses its mean, unit by unit.
How:    before clipping, from each output unit's row its mean is subtracted; vectors (norms, biases) are left alone.
Memory: one value a row at a time.
Source: Yong et al. 2020, arXiv:2004.01461.
"""

from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.targets import LoopBuild


class GradientCentralization(Optimization):
    """See the module's docstring."""

    name = "gradient_centralization"
    title = "gradient centralization"
    row = 25
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.GRADIENT_MEAN})
    source = "Yong et al. 2020"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: LoopBuild) -> Applied:
        from elite.optimizations.functions.gradients import Centralization

        matrices = sum(parameter.ndim > 1 for parameter in target.parameters)
        undo = target.add(Centralization(self.name))
        return Applied(matrices, f"of {len(target.parameters)} gradients", undo)
