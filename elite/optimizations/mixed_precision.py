"""Mixed precision.

What:   matrix products in bf16, or fp16 with loss scaling on cards without bf16; trained weights stay fp32.
How:    frozen weights are stored in the compute dtype, the forward pass runs under torch.autocast.
Memory: frozen weights and activations at 2 bytes a value instead of 4; trained weights, gradients and state stay at 4.
Source: Micikevicius et al. 2018, arXiv:1710.03740; torch.autocast.
"""

from dataclasses import replace
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.parts import FP32
from elite.optimizations.shapes import stream_value_bytes
from elite.optimizations.targets import Runtime

HALF = 2
"""Bytes of a bf16 or fp16 value."""


class MixedPrecision(Optimization):
    """See the module's docstring."""

    name = "mixed_precision"
    title = "mixed precision (bf16 / fp16)"
    row = 5
    stage = Stage.runtime
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.COMPUTE_DTYPE})
    source = "Micikevicius et al. 2018"

    def check(self, facts: Facts) -> str | None:
        if facts.device.kind == "cpu" and not facts.device.supports_bf16:
            return "this CPU has no bf16 instructions: bf16 would be slower than fp32"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        standing = step.standing
        share = 1.0 if facts.adapter == "full" else HALF / FP32
        # Maps that are trained beside frozen ones keep their own weights in fp32.
        own = (FP32 - HALF) * facts.model.trained_linear_params
        weights = replace(standing, linear_weights=standing.linear_weights * share + own, other_weights=standing.other_weights * share)
        return replace(step, standing=weights, value=HALF, hidden=stream_value_bytes(HALF, facts))

    def apply(self, target: Runtime) -> Applied:
        before = target.compute_dtype
        target.compute_dtype = "bfloat16" if target.supports_bf16 else "float16"

        def undo() -> None:
            target.compute_dtype = before

        return Applied(1, target.compute_dtype, undo)
