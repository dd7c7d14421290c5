"""8-bit AdamW.

What:   both moments of Adam in 8 bits, block-wise quantised.
How:    bitsandbytes' AdamW8bit; tensors under 4,096 elements keep fp32 state, as that library does. With `paged`, its PagedAdamW8bit:
        the state of tensors of 100,000 elements and more lies in memory that CUDA moves between host and device as it is used.
Memory: in tensors of at least 4,096 elements 2 bytes of state a trained parameter (and 8 bytes a block of 256) instead of 8. Paged, what
        is paged counts as the host's.
Source: Dettmers et al. 2022, arXiv:2110.02861; bitsandbytes.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.shapes import trained_in_tensors_of
from elite.optimizations.targets import OptimizerBuild

MIN_QUANTISED_ELEMENTS = 4096
BLOCK = 256
"""Elements that share one scale in each of the two moments."""
STATE_BYTES = 2 + 8 / BLOCK
"""Both moments of one parameter."""
MIN_PAGED_ELEMENTS = 100_000
"""bitsandbytes pages tensors no smaller than this."""


class AdamW8bit(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        paged: bool = False
        """Let the state leave the device where memory is short."""

    name = "adamw_8bit"
    title = "8-bit AdamW"
    row = 2
    stage = Stage.optimizer
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.OPTIMIZER_STATE})
    source = "Dettmers et al. 2022"

    def check(self, facts: Facts) -> str | None:
        if self.config.paged and facts.device.kind != "cuda":
            return "bitsandbytes pages state on CUDA devices only: optimizations.adamw_8bit.paged=false"
        if not trained_in_tensors_of(facts, MIN_QUANTISED_ELEMENTS):
            return f"no trained tensor has {MIN_QUANTISED_ELEMENTS:,} elements; smaller ones keep fp32 state"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        saved = (8 - STATE_BYTES) * trained_in_tensors_of(facts, MIN_QUANTISED_ELEMENTS)
        state = step.standing.optimizer_state - saved - self.host_memory(step, facts)
        return replace(step, standing=replace(step.standing, optimizer_state=state), optimizer_workspace=0.0)

    def host_memory(self, step: Step, facts: Facts) -> float:
        return STATE_BYTES * trained_in_tensors_of(facts, MIN_PAGED_ELEMENTS) if self.config.paged else 0.0

    def apply(self, target: OptimizerBuild) -> Applied:
        import bitsandbytes

        from elite.optimizations.functions.paged import PagedState

        before = target.factory
        target.factory = PagedState if self.config.paged else bitsandbytes.optim.AdamW8bit
        parameters: list[Any] = [p for group in target.groups for p in group["params"]]
        count = sum(p.numel() >= MIN_QUANTISED_ELEMENTS for p in parameters)

        def undo() -> None:
            target.factory = before

        return Applied(count, f"of {len(parameters)} parameters", undo)
