"""Stochastic weight averaging.

What:   the mean of the weights that the last part of the run passes through; validation and export see it once it exists.
How:    torch's AveragedModel over what is trained, from `start` of the steps on, every `every` steps. With `rate` the learning rate
        leaves the schedule there and anneals to that rate (torch's SWALR); else the schedule goes on. `final/` holds the mean, a
        checkpoint's `model/` the trained weights.
Memory: the mean, 4 bytes a trained parameter, in checkpoints too.
Source: Izmailov et al. 2018, arXiv:1803.05407; torch.optim.swa_utils.
"""

from dataclasses import dataclass
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild


class SWA(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        start: float = 0.75
        """Share of the steps before the first weights that count."""
        every: int = 1
        """Steps between two weights that count."""
        rate: float | None = None
        """Learning rate from then on, of the first parameter group (others in proportion); unset: the schedule's."""
        anneal: int = 10
        """Steps in which the rate gets there."""

        def __post_init__(self) -> None:
            require("swa.start", self.start, 0 <= self.start < 1, "must lie in [0, 1)")
            require("swa.every", self.every, self.every >= 1, "must be at least 1")
            require("swa.rate", self.rate, self.rate is None or 0 < self.rate < float("inf"), "must be positive and finite")
            require("swa.anneal", self.anneal, self.anneal >= 1, "must be at least 1")

    name = "swa"
    title = "stochastic weight averaging"
    row = 22
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.EVALUATED_WEIGHTS})
    source = "Izmailov et al. 2018"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step.beside_trained(facts)

    def apply(self, target: LoopBuild) -> Applied:
        from elite.optimizations.functions.averages import RunningMean

        config = self.config
        first = max(1, round(config.start * target.steps))
        hook = RunningMean(self.name, target.parameters, first, config.every, target.optimizer, config.rate, config.anneal)
        members = (target.steps - first) // config.every + 1
        # The mean of one is that one.
        return Applied(members if members > 1 else 0, f"weights averaged from step {first} of {target.steps} on", target.add(hook))
