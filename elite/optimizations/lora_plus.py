"""LoRA+: the two matrices of an adapter learn at different rates.

What:   B, which begins at zero, learns `ratio` times as fast as A.
How:    peft's own grouping (create_loraplus_optimizer) of what is trained; the rate that the run plans is A's. Schedules scale every
        group alike, and any optimizer takes the groups.
Memory: nothing.
Source: Hayou et al. 2024, arXiv:2402.12354; peft.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.targets import OptimizerBuild


class LoRAPlus(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        ratio: float = 16.0
        """Learning rate of B over that of A; the paper's experiments favour 2⁴."""

        def __post_init__(self) -> None:
            require("lora_plus.ratio", self.ratio, 1 < self.ratio < float("inf"), "must be finite and above 1")

    name = "lora_plus"
    title = "LoRA+ (faster B)"
    row = 13
    stage = Stage.optimizer
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.PARAMETER_GROUPS})
    source = "Hayou et al. 2024"

    def check(self, facts: Facts) -> str | None:
        if facts.adapter != "lora":
            return "there are no adapters whose B could learn faster: adapter.method=lora"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: OptimizerBuild) -> Applied:
        from peft.optimizers import create_loraplus_optimizer

        before, rate = target.groups, target.arguments["lr"]
        recorder: Any = _Groups
        decay = max(group["weight_decay"] for group in before)
        made: Any = create_loraplus_optimizer(
            target.model, recorder, lr=rate, loraplus_lr_ratio=self.config.ratio, loraplus_weight_decay=decay
        )
        target.groups = [group for group in made.groups if group["params"]]

        def undo() -> None:
            target.groups = before

        fast = [group for group in target.groups if group["lr"] == rate * self.config.ratio]
        count, total = (sum(len(group["params"]) for group in groups) for groups in (fast, target.groups))
        return Applied(count, f"of {total} parameters learn {self.config.ratio:g} times as fast", undo)


class _Groups:
    """Stands where peft would make the optimizer, which the run makes itself of these groups."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        self.groups = groups
