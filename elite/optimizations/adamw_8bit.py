"""8-bit AdamW.

What:   both moments of Adam in 8 bits, block-wise quantised.
How:    bitsandbytes' AdamW8bit; tensors under 4,096 elements keep fp32 state, as that library does.
Memory: 2 bytes of state a trained parameter (and 8 bytes a block of 256) instead of 8.
Source: Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes.
"""

from dataclasses import replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.targets import OptimizerBuild

MIN_QUANTISED_ELEMENTS = 4096
BLOCK = 256
"""Elements that share one scale in each of the two moments."""


class AdamW8bit(Optimization):
    """See the module's docstring."""

    name = "adamw_8bit"
    title = "8-bit AdamW"
    row = 2
    stage = Stage.optimizer
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.OPTIMIZER_STATE})
    source = "Dettmers et al. 2022"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        state = step.standing.optimizer_state * (2 + 8 / BLOCK) / 8
        return replace(step, standing=replace(step.standing, optimizer_state=state), optimizer_workspace=0.0)

    def apply(self, target: OptimizerBuild) -> Applied:
        import bitsandbytes

        before = target.factory
        target.factory = bitsandbytes.optim.AdamW8bit
        parameters: list[Any] = [p for group in target.groups for p in group["params"]]
        count = sum(p.numel() >= MIN_QUANTISED_ELEMENTS for p in parameters)

        def undo() -> None:
            target.factory = before

        return Applied(count, f"of {len(parameters)} parameters", undo)
