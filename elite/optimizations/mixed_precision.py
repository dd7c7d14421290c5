"""Mixed precision.

What:   matrix products in bf16, or fp16 with loss scaling on cards without bf16; trained weights stay fp32.
How:    frozen weights are stored in the compute dtype, the forward pass runs under torch.autocast.
Memory: frozen weights and activations at 2 bytes a value instead of 4; trained weights, gradients and state stay at 4.
Source: Micikevicius et al. 2018, arXiv:1710.03740; torch.autocast.
"""

from dataclasses import replace
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Estimate, Exactness, Optimization, Site, Stage
from elite.optimizations.targets import Runtime


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

    def memory(self, estimate: Estimate, facts: Facts) -> Estimate:
        frozen = 0.5 if facts.adapter == "lora" else 1.0
        return replace(
            estimate,
            linear_weights=estimate.linear_weights * frozen,
            other_weights=estimate.other_weights * frozen,
            saved_activations=estimate.saved_activations * 0.5,
            attention_scores=estimate.attention_scores * 0.5,
            layer_workspace=estimate.layer_workspace * 0.5,
        )

    def apply(self, target: Runtime) -> Applied:
        before = target.compute_dtype
        target.compute_dtype = "bfloat16" if target.supports_bf16 else "float16"

        def undo() -> None:
            target.compute_dtype = before

        return Applied(1, target.compute_dtype, undo)
