"""Label smoothing.

What:   the loss asks for 1 - ε of the probability at the label and shares ε among all tokens of the vocabulary.
How:    the executor of training passes ε on to whichever loss it has: torch's cross-entropy, the fused loss, the streamed loss. The
        training loss that is reported is the smoothed one; validation keeps the plain one.
Memory: nothing: the gradient takes the place of the plain one.
Source: Szegedy et al. 2016, arXiv:1512.00567.
"""

from dataclasses import dataclass
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild


class LabelSmoothing(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        epsilon: float = 0.1
        """Probability that is shared among all tokens."""

        def __post_init__(self) -> None:
            require("label_smoothing.epsilon", self.epsilon, 0 < self.epsilon < 1, "must lie in (0, 1)")

    name = "label_smoothing"
    title = "label smoothing"
    row = 26
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.LOSS_TARGETS})
    source = "Szegedy et al. 2016"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: LoopBuild) -> Applied:
        executor = target.executor
        before = executor.label_smoothing
        executor.label_smoothing = self.config.epsilon

        def undo() -> None:
            executor.label_smoothing = before

        return Applied(1, f"training loss with ε = {self.config.epsilon:g}", undo)
