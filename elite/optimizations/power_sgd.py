"""PowerSGD.

What:   ranks exchange low-rank factors of their gradients instead of the gradients.
How:    a gradient matrix M [n, m] is sent as P = MQ and Q = MᵀP, r (n + m) values instead of n · m, by torch's hook on DDP. Vectors, and
        matrices that this would not make half as large, are sent whole. What a rank's factors leave out it adds to its next gradient
        (`error_feedback`); each step begins with the last one's Q (`warm_start`). The first `start_iteration` exchanges of a run are
        plain ones. What a rank keeps is part of a checkpoint, by parameter, so that it continues exactly. After a gradient that is not
        finite it begins anew; with loss scaling (fp16), what is left out counts by the scale of the step it is from.
Memory: with error feedback, what was left out and a copy of the gradients while they are exchanged, 8 bytes a trained parameter, and 4 in
        checkpoints for each rank; the factors.
Source: Vogels et al. 2019, arXiv:1905.13727; torch.distributed's ddp_comm_hooks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import (
    Applied,
    Behind,
    Exactness,
    Exchange,
    Optimization,
    OptimizationConfig,
    Passes,
    Site,
    Stage,
    Step,
    summed,
)
from elite.optimizations.options import require
from elite.optimizations.parts import FP32
from elite.optimizations.shapes import adapter_rank
from elite.optimizations.targets import LoopBuild

LEAST_COMPRESSION = 2
"""A matrix whose factors would not be so many times smaller is sent whole: the products cost more than they save (torch's default)."""
FIRST = 2
"""DDP lays its gradients out anew after the first exchange; torch compresses none before."""


class PowerSGD(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        rank: int = 2
        """r: columns of the factors; 1 to 4 are usual. Adapters of few rows need a small one."""
        start_iteration: int = 10
        """Exchanges before the first that is compressed: early gradients change fast."""
        error_feedback: bool = True
        """What the factors leave out is added to the next gradient."""
        warm_start: bool = True
        """Begin with the factors of the step before, not with drawn ones."""

        def __post_init__(self) -> None:
            require("power_sgd.rank", self.rank, 1 <= self.rank <= 2**16, f"must lie in [1, {2**16}]")
            rule = f"must be at least {FIRST}: DDP lays its gradients out anew after the first exchange"
            require("power_sgd.start_iteration", self.start_iteration, self.start_iteration >= FIRST, rule)

    name = "power_sgd"
    title = "PowerSGD gradient compression"
    row = 39
    stage = Stage.loop
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.GRADIENT_EXCHANGE})
    source = "Vogels et al. 2019; torch ddp_comm_hooks"

    def check(self, facts: Facts) -> str | None:
        if facts.device.count == 1:
            return "one rank exchanges nothing"
        if self._factor_values(facts) == 0:
            return f"no trained matrix is {LEAST_COMPRESSION} times larger than its factors of rank {self.config.rank}"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        if facts.device.count == 1:
            return step
        kept = self._factor_values(facts) + (2 * facts.trainable_params if self.config.error_feedback else 0)
        return replace(step, standing=replace(step.standing, trainable_copy=step.standing.trainable_copy + FP32 * kept))

    def checkpoint_bytes(self, facts: Facts) -> float:
        # Q alone, of P and Q.
        factors = self._factor_values(facts, left=False) if self.config.warm_start else 0
        return FP32 * (factors + (facts.device.count * facts.trainable_params if self.config.error_feedback else 0))

    def exchange(self, passes: Passes, facts: Facts) -> Exchange:
        whole = sum(count * rows * columns for count, rows, columns, _ in self._compressed(facts))
        handed = FP32 * (facts.trainable_params - whole + self._factor_values(facts))
        return summed("gradients as factors", handed, facts.device.count, Behind.last_backward)

    def apply(self, target: LoopBuild) -> Applied:
        from torch.nn.parallel import DistributedDataParallel

        from elite.optimizations.functions.exchange import LowRankExchange

        model, options = target.executor.model, self.config
        # Whoever exchanges gradients otherwise has no place for the hook.
        if not isinstance(model, DistributedDataParallel):
            return Applied(0, "matrices")
        arguments = options.rank, options.start_iteration, options.error_feedback, options.warm_start
        hook = LowRankExchange(self.name, model, *arguments, LEAST_COMPRESSION, target.seed)
        remove = target.add(hook)

        def undo() -> None:
            hook.end()
            remove()

        words = f"matrices are exchanged as factors of rank {options.rank} after {options.start_iteration} exchanges"
        return Applied(hook.compressed, words, undo, hook.words)

    def _factor_values(self, facts: Facts, left: bool = True) -> int:
        """Values in the factors of all matrices that are compressed; `left`: of P, too."""
        return sum(count * rank * (columns + (rows if left else 0)) for count, rows, columns, rank in self._compressed(facts))

    def _compressed(self, facts: Facts) -> Iterator[tuple[int, int, int, int]]:
        """Matrices that are sent as factors: how many, their shape, and the rank."""
        for count, rows, columns in _matrices(facts):
            rank = min(self.config.rank, rows, columns)
            if LEAST_COMPRESSION * rank * (rows + columns) < rows * columns:
                yield count, rows, columns, rank


def _matrices(facts: Facts) -> list[tuple[int, int, int]]:
    """Trained matrices: how many, and of which shape."""
    model, layers, own = facts.model, facts.model.num_hidden_layers, adapter_rank(facts)
    if facts.adapter == "lora":
        return [(layers, rows, columns) for one in model.layer_linears for rows, columns in ((own, one.inputs), (one.outputs, own))]
    trained = [one for one in model.layer_linears if one.trained or facts.adapter == "full"]
    outer = [(1 if model.tied else 2, model.vocab_size, model.hidden_size)] if facts.adapter == "full" else []
    return [(layers, one.outputs, one.inputs) for one in trained] + outer
