"""QLoRA: frozen weights in 4 bits.

What:   every linear map of the decoder layers stored as NF4 with double quantisation; adapters train on top.
How:    each nn.Linear becomes bitsandbytes' Linear4bit, dequantised in the matrix product, of many rows on a GPU by a kernel of ours.
        Head and embedding stay as they are.
Memory: 0.5 byte a weight plus one 8-bit scale a block of 64 and one fp32 scale a block of 256 scales: 0.516 bytes; one linear
        map at a time stands there dequantised.
Source: Dettmers et al. 2023, arXiv:2305.14314; bitsandbytes.
"""

from dataclasses import replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step

BLOCK = 64
"""Weights that share a scale."""
SCALE_BLOCK = 256
"""8-bit scales that share one in fp32 (double quantisation)."""


def packed_bytes(weights: float) -> float:
    """NF4 weights with their scales (Dettmers et al. 2023, section 3)."""
    return weights * (0.5 + (1 + 4 / SCALE_BLOCK) / BLOCK)


def dequantised_bytes(facts: Facts, width: float) -> float:
    """The largest linear map of a layer as it stands while its product is formed, at `width` bytes a weight."""
    return width * max(linear.inputs * linear.outputs for linear in facts.model.layer_linears)


class QLoRA(Optimization):
    """See the module's docstring."""

    name = "qlora"
    title = "QLoRA (NF4, double quantisation)"
    row = 6
    stage = Stage.model
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.BASE_WEIGHTS})
    source = "Dettmers et al. 2023"

    def check(self, facts: Facts) -> str | None:
        if facts.adapter != "lora":
            return "quantised weights cannot be trained: adapter.method=lora"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        standing = replace(step.standing, linear_weights=packed_bytes(facts.model.linear_params))
        return replace(step, standing=standing, map_at_work=dequantised_bytes(facts, step.value))

    def apply(self, target: Any) -> Applied:
        from bitsandbytes.nn import Params4bit
        from torch import nn

        from elite.optimizations.functions.four_bit import FourBitLinear

        count = 0
        for layer in target.get_decoder().layers:
            linears = [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]
            for name, linear in linears:
                dtype = linear.weight.dtype
                packed = FourBitLinear(
                    linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
                )
                # Packed when it is moved to its device: a full-precision copy never stands there.
                packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
                packed.bias = linear.bias
                # After an evaluation its inference layout for such CPUs would stay, through which no gradient passes.
                packed.support_avx512bf16_for_cpu = False
                layer.set_submodule(name, packed)
                count += 1
        # peft picks its 4-bit adapter layer by this flag.
        target.is_loaded_in_4bit = True
        return Applied(count, "linear maps in NF4")
