"""ZeRO-2: ranks divide gradients and the optimizer's state.

What:   each rank keeps the gradients of its own part of what is trained, and takes the optimizer's step for that part.
How:    DeepSpeed's engine (elite/distributed/zero.py) around the run's own optimizer, its configuration made from the run's. Gradients are
        summed over ranks in every backward, in fp32, and each keeps its part; after the step ranks gather each other's weights. With
        `offload_optimizer` gradients, fp32 weights and state lie in host memory, and the step is taken there; that is of use on one rank,
        too. A checkpoint holds whole parameters' state, so any number of ranks goes on from it.
Memory: R ranks, P trained parameters: state 8P/R bytes, gradients 4P/R (twice with several micro-batches), a bucket of them and the copy of
        it that is exchanged, a copy of the weights that the step is taken on 4P/R; with `offload_optimizer` bucket, copy and the largest
        gradient, and in host memory 20P/R (24P/R with several micro-batches) and the latter.
Source: Rajbhandari et al. 2020, arXiv:1910.02054; Ren et al. 2021, arXiv:2101.06840 (offload); DeepSpeed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import (
    Applied,
    Behind,
    Decision,
    Exactness,
    Exchange,
    Optimization,
    OptimizationConfig,
    Passes,
    Site,
    Stage,
    Step,
)
from elite.optimizations.parts import FP32
from elite.optimizations.shapes import largest_trained
from elite.optimizations.targets import LoopBuild

BUCKET = 2**25
"""Values of gradients that are exchanged at once: larger messages are hardly faster."""
ON_HOST = 20
"""Bytes of a trained parameter with `offload_optimizer`: fp32 weight, its copy on the way, gradient, two moments."""
EXCHANGE = "divided gradients and weights"
"""What ranks exchange; the engine waits for it."""
PARTS = "gradients lie in parts on the ranks when it would act on them"


class ZeRO2(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        offload_optimizer: bool = False
        """The optimizer's state lies in host memory, and its step is taken there."""

    name = "zero_2"
    title = "ZeRO-2 (divided gradients and optimizer state)"
    row = 3
    stage = Stage.loop
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.GRADIENT_EXCHANGE})
    source = "Rajbhandari et al. 2020; DeepSpeed"
    number: ClassVar[int] = 2
    """Of the stage, in the paper's count."""

    @property
    def excludes(self) -> Mapping[Site, str]:
        found = dict.fromkeys((Site.GRADIENT_MEAN, Site.UNIT_GRADIENT_NORM, Site.GRADIENT_NOISE), PARTS)
        found[Site.SLOW_WEIGHTS] = "the optimizer steps on a copy of the weights, which would undo the return to others"
        found[Site.FIRST_PASS] = "gradients of a pass that is no step's would be exchanged"
        if self.config.offload_optimizer:
            found[Site.OPTIMIZER_STATE] = "state in host memory is fp32"
        return found

    def check(self, facts: Facts) -> str | None:
        if facts.device.count == 1 and not self.config.offload_optimizer:
            return "one rank has no other to divide with, and nothing is offloaded (optimizations.zero_2.offload_optimizer)"
        if facts.device.present and find_spec("deepspeed") is None:
            return "DeepSpeed is not installed: pip install deepspeed"
        return None

    @property
    def offloads(self) -> bool:
        """Whether anything lies in host memory."""
        return bool(self.config.offload_optimizer)

    def memory(self, step: Step, facts: Facts) -> Step:
        standing, ranks = step.standing, facts.device.count
        bucket = 2 * FP32 * _bucket(facts)
        if self.config.offload_optimizer and facts.device.kind == "cuda":
            kept = replace(standing, gradients=bucket + self._on_the_way(facts), optimizer_state=0.0)
            return replace(step, standing=kept, optimizer_workspace=0.0, gradients_stand=True)
        own = FP32 * facts.trainable_params / ranks
        parts = replace(
            standing,
            gradients=own * self._sums(facts) + bucket,
            optimizer_state=standing.optimizer_state / ranks,
            trainable_copy=standing.trainable_copy + own,
        )
        return replace(step, standing=parts, optimizer_workspace=step.optimizer_workspace / ranks, gradients_stand=True)

    def host_memory(self, step: Step, facts: Facts) -> float:
        if not self.config.offload_optimizer or facts.device.kind != "cuda":
            return 0.0
        each = ON_HOST + FP32 * (self._sums(facts) - 1)
        return each * facts.trainable_params / facts.device.count + self._on_the_way(facts)

    def _sums(self, facts: Facts) -> int:
        """How often a rank has its gradients: a pass's, and the sum of those of the passes before."""
        return 1 if facts.accumulation == 1 else 2

    def _on_the_way(self, facts: Facts) -> float:
        """A gradient that goes to host memory waits on the device, and is added to others there."""
        return FP32 * largest_trained(facts)

    def exchange(self, passes: Passes, facts: Facts) -> Exchange:
        """Gradients in every backward, of which ranks have the sum before they keep a part; stepped weights from who keeps them."""
        handed, ranks = FP32 * facts.trainable_params, facts.device.count
        return Exchange(EXCHANGE, handed * (passes.count + 1), (ranks - 1) / ranks * handed * (2 * passes.count + 1), Behind.nothing)

    def settings(self, facts: Facts, dtype: str) -> dict[str, Any]:
        """DeepSpeed's configuration.

        Args:
            dtype: of matrix products, by name.
        """
        cuda = facts.device.kind == "cuda"
        zero: dict[str, Any] = {
            "stage": self.number,
            "reduce_bucket_size": _bucket(facts),
            "allgather_bucket_size": _bucket(facts),
            "overlap_comm": False,
        }
        if self.config.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        return {
            # The run normalises, accumulates and clips itself; nothing is derived from these.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            # The run's own optimizer takes the step, also in host memory.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # No module's gradients or weights travel in fewer bits than they have.
            "torch_autocast": {"enabled": dtype != "float32", "dtype": dtype, "lower_precision_safe_modules": []},
        }

    def apply(self, target: LoopBuild) -> Applied:
        # Whoever exchanges gradients otherwise has no parts.
        if not getattr(target.executor.model, "in_every_pass", False):
            return Applied(0, "trained parameters")
        where = ", in host memory" if self.offloads else ""
        return Applied(len(target.parameters), f"trained parameters divided{where}", lambda: None)


def _bucket(facts: Facts) -> int:
    return min(BUCKET, max(1, facts.trainable_params))


def active_zero(decisions: Iterable[Decision]) -> ZeRO2 | None:
    """What divides gradients among ranks in this run."""
    chosen = (decision.optimization for decision in decisions if decision.active and isinstance(decision.optimization, ZeRO2))
    return next(chosen, None)
