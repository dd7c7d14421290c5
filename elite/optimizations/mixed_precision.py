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
from elite.optimizations.shapes import formula_gelu_bytes
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
        full = facts.adapter == "full"
        frozen = 1.0 if full else 0.5
        # Norms work in fp32 and keep their input so: two a layer at most, two bytes more a value than the rest.
        fp32_kept = 2 * 2 * facts.model.hidden_size
        fp32_kept += formula_gelu_bytes(facts)
        fp32_kept *= facts.model.num_hidden_layers * facts.micro_tokens
        return replace(
            estimate,
            linear_weights=estimate.linear_weights * frozen,
            other_weights=estimate.other_weights * frozen,
            # Autocast keeps a two-byte copy of every trained weight from forward to backward.
            trainable_copy=estimate.trainable_copy + (2 * facts.trainable_params if full else 0),
            saved_activations=estimate.saved_activations * 0.5 + fp32_kept,
            # Unfused attention takes its softmax in fp32 and keeps that beside the two-byte weights: six bytes instead of four.
            attention_scores=estimate.attention_scores * 1.5,
            layer_workspace=estimate.layer_workspace * 0.5,
            mlp_workspace=estimate.mlp_workspace * 0.5,
        )

    def apply(self, target: Runtime) -> Applied:
        before = target.compute_dtype
        target.compute_dtype = "bfloat16" if target.supports_bf16 else "float16"

        def undo() -> None:
            target.compute_dtype = before

        return Applied(1, target.compute_dtype, undo)
