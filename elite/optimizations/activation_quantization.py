"""Saved activations in 8 or 4 bits.

What:   what decoder layers keep from forward to backward is kept as integers: everything, or with gradient checkpointing their inputs.
How:    torch's saved-tensor hooks around each layer, with the encodings of the streamed executor's boundaries (elite/kernels/pack): 8 bits
        and a scale a group of 64, or 4.5 bits a value, entropy coded. A tensor that several functions save is packed once. Left as they
        are: parameters and what is made of them alone, what a layer is given besides its input, and tensors with fewer than `width`
        values a token (log-sum-exps, adapters' low rank, statistics of norms). The forward pass itself stays exact.
Memory: 8.25 or 4.5 bits instead of 16 or 32 a value; what one function's backward reads comes back while it works. The layer at work
        keeps its own tensors beside their packed copies until its forward is over.
Source: Chen et al. 2021, arXiv:2104.14129 (ActNN); Liu et al. 2022, arXiv:2206.11357 (GACT); codes: elite/kernels/pack/reference.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.streaming import BoundaryEncoding

ENCODING_OF_BITS = {8: BoundaryEncoding.int8, 4: BoundaryEncoding.int4}
STORED_BITS = {8: 8.25, 4: 4.5}
"""A value, scales included."""
SCRATCH_BYTES = {8: 16, 4: 43}
"""A value at work where no kernel runs (on a CPU): fp32 copies, codes, positions."""
TILE_VALUES = 1 << 21
"""Values at work at once there."""


class ActivationQuantization(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        bits: int = 8
        """8 or 4."""
        width: int = 128
        """Values a token that a tensor must have to be packed."""

        def __post_init__(self) -> None:
            require("activation_quantization.bits", self.bits, self.bits in STORED_BITS, "must be 8 or 4")
            require("activation_quantization.width", self.width, self.width >= 1, "must be positive")

    name = "activation_quantization"
    title = "saved activations in 8 or 4 bits"
    row = 38
    stage = Stage.executor
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.SAVED_TENSORS})
    source = "Chen et al. 2021"

    def check(self, facts: Facts) -> str | None:
        if facts.executor == "streamed":
            return f"with the streamed executor this is executor.encoding={ENCODING_OF_BITS[self.config.bits].value}"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        scratch = SCRATCH_BYTES[self.config.bits] if facts.device.kind == "cpu" else 0
        return replace(step, packed_bits=STORED_BITS[self.config.bits], packing=scratch)

    def apply(self, target: Any) -> Applied:
        from elite.optimizations.functions.packed import Packing

        layers = target.get_decoder().layers
        packing = Packing(layers, self.config.bits, self.config.width)
        return Applied(len(layers), f"decoder layers, {self.config.bits} bits", packing.undo)
