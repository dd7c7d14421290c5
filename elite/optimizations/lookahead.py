"""Lookahead.

What:   every k steps the weights return part of the way to where they were: slow weights follow the fast ones that the optimizer moves.
How:    φ ← φ + α (θ - φ), then θ ← φ, after every k-th step and after the last one; the optimizer keeps its moments. Validation and
        export see the slow weights, as the paper's do.
Memory: the slow weights, 4 bytes a trained parameter, in checkpoints too.
Source: Zhang et al. 2019, arXiv:1907.08610.
"""

from dataclasses import dataclass
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild


class Lookahead(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        k: int = 5
        """Steps between two returns."""
        alpha: float = 0.5
        """Share of the way that the slow weights follow."""

        def __post_init__(self) -> None:
            require("lookahead.k", self.k, self.k >= 1, "must be at least 1")
            require("lookahead.alpha", self.alpha, 0 < self.alpha <= 1, "must lie in (0, 1]")

    name = "lookahead"
    title = "Lookahead"
    row = 23
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.SLOW_WEIGHTS})
    source = "Zhang et al. 2019"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step.beside_trained(facts)

    def apply(self, target: LoopBuild) -> Applied:
        from elite.optimizations.functions.averages import SlowWeights

        hook = SlowWeights(self.name, target.parameters, self.config.k, self.config.alpha, target.steps)
        return Applied(len(target.parameters), f"parameters return every {self.config.k} steps", target.add(hook))
