"""What a step moves through the device's memory besides matrix products and attention: bytes a token.

Every figure is what an operation takes, times the rate of a copy: bytes that would take as long if they were copied. Those of layers are
for two-byte values, from kernels_h100.json at 32,768 tokens (`PER_UNIT`), an operation's forward and its backward apart.

Units: d hidden size, f MLP width, (H + K)D values of queries and keys, V vocabulary; inputs and outputs of a linear map with an adapter.
"""

from dataclasses import dataclass

from elite.facts import FORMULA_GELU, Facts
from elite.optimizations.contract import Decision, Site
from elite.optimizations.shapes import is_gated, mlp_width


@dataclass(frozen=True)
class Cost:
    """Bytes a unit and token."""

    forward: float
    backward: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, units: float) -> "Cost":
        return Cost(self.forward * units, self.backward * units)


EAGER, FUSED = "eager", "fused"
PER_UNIT: dict[str, dict[str, Cost]] = {
    "layer_norm": {EAGER: Cost(20.0, 24.0), FUSED: Cost(4.2, 6.8)},
    "rms_norm": {EAGER: Cost(45.0, 96.0), FUSED: Cost(4.1, 6.0)},
    # A norm's kernel takes the sum before it along.
    "sum": {EAGER: Cost(6.0, 6.0), FUSED: Cost(4.0, 2.0)},
    "dropped_sums": {EAGER: Cost(24.0, 10.0), FUSED: Cost(8.8, 7.9)},
    "rotary": {EAGER: Cost(42.0, 49.0), FUSED: Cost(4.5, 4.5)},
    "partial_rotary": {EAGER: Cost(31.2, 40.8), FUSED: Cost(2.9, 4.2)},
    "gated": {EAGER: Cost(9.8, 17.5), FUSED: Cost(5.9, 9.8)},
    "formula_gelu": {EAGER: Cost(76.0, 116.0), FUSED: Cost(4.0, 5.9)},
    "activation": {EAGER: Cost(4.0, 6.0), FUSED: Cost(4.0, 5.9)},
}
"""From kernels_h100.json, rows of 32,768 tokens: `eager` and `elite`."""
ADAPTER = {EAGER: Cost(3.6, 5.4), FUSED: Cost(1.0, 1.2)}
"""A linear map's input or output, for its adapter (fitted to the device-bound steps of the grids of calibration)."""
PACKED_ADAPTER = {EAGER: Cost(6.0, 9.0), FUSED: Cost(5.5, 7.5)}
"""The same beside a four-bit map, to whose output a further product adds."""
IN_STEPS = {EAGER: 1.12, FUSED: 0.85}
"""What `PER_UNIT` takes in steps over what it took alone: what was just written is still at hand for fused kernels, and a faster memory
than the H100's is not wholly used by eager ones (the same grids, on an H200)."""
LOSS = {EAGER: 42.0, FUSED: 5.0}
"""A logit, forward and backward (kernels_h100.json, `linear_cross_entropy` with a frozen head, less its products)."""
CONVERTED = Cost(6.0, 18.0)
"""A value of what autocast keeps in fp32, a layer norm's output or the activation's, for each function beyond the first that reads it and
multiplies in half precision: read in four bytes and written in two; its gradient the other way round, and added up in fp32."""
ATTENTION_LAYOUT = Cost(8.0, 12.0)
"""Queries, keys, values and output of a layer, each value: copies between the layouts of linear maps and kernels, and the products of
output and gradient (read and written in two bytes each, twice forward and three times backward)."""
STREAMED = Cost(8.0, 20.0)
"""A value of one layer's attention output, besides, where chunks are merged and gradients of keys added up in fp32: each part read and
written (kernels_h100.json, `merge` and `group_sum`)."""
DEQUANTISED = 4.2
"""A four-bit weight, each time it is needed: what a copy moves in the time of our kernel (kernels_dequantise.json, maps of MLPs)."""
OPTIMIZER = 108.0
"""A trained parameter, in fp32: what torch's AdamW reads and writes where it takes all tensors at once, one operation after another (decay
8, first moment 12, second 8 + 12, its root, quotient and epsilon 8 each, the weight 16), the gradients' norm 4 and their clipping 8; all
of it at some six sevenths of a copy's rate (grids of calibration, full fine-tuning)."""
HEAD_GRADIENT = 8.0
"""A trained head's weight, each time a tile of tokens adds to its fp32 gradient."""
HEAD_CHUNK = 44.0
"""The same weight, each time a chunk passes, or the whole pass: in the compute dtype (6), its gradient begun (4), scaled (8) and added to
other chunks' (12), and of the embedding a gradient as large, which is begun (4) and added up (some 10): counted by hand, as what is read
and written."""
PHI_READERS = 4
"""Maps that read the one norm of Phi's layers: queries, keys, values and the MLP's first."""
FP32_WIDTH = 2.0
"""fp32 over two-byte values."""


def layer(facts: Facts, decisions: tuple[Decision, ...]) -> Cost:
    """One pass of one decoder layer, a token: norms, sums, rotary embedding, activation, attention's layouts."""
    model = facts.model
    how = FUSED if active(decisions, Site.ELEMENTWISE) else EAGER
    phi = model.model_type in FORMULA_GELU
    heads = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    per = {name: costs[how] * IN_STEPS[how] for name, costs in PER_UNIT.items()}
    if phi:
        found = (per["layer_norm"] + per["dropped_sums"]) * model.hidden_size + per["partial_rotary"] * heads
        found += per["formula_gelu"] * mlp_width(facts)
        if how == EAGER and active(decisions, Site.COMPUTE_DTYPE):
            of_norm, of_activation = _readers(facts, decisions)
            found += CONVERTED * ((of_norm - 1) * model.hidden_size + (of_activation - 1) * mlp_width(facts))
    else:
        found = (per["rms_norm"] + per["sum"]) * (2 * model.hidden_size) + per["rotary"] * heads
        found += per["gated" if is_gated(facts) else "activation"] * mlp_width(facts)
    return (found + ATTENTION_LAYOUT * (2 * heads)) * _width(decisions)


def _readers(facts: Facts, decisions: tuple[Decision, ...]) -> tuple[int, int]:
    """Functions that read the norm and the activation of a parallel block: maps and their adapters, which a fused LoRA joins."""
    if facts.adapter != "lora":
        return PHI_READERS, 1
    if active(decisions, Site.LORA_FORWARD) and not active(decisions, Site.BASE_WEIGHTS):
        return 2, 1
    return 2 * PHI_READERS, 2


def adapters(facts: Facts, decisions: tuple[Decision, ...]) -> Cost:
    """One pass of one layer's adapters, a token."""
    if facts.adapter != "lora":
        return Cost(0.0, 0.0)
    how = FUSED if active(decisions, Site.LORA_FORWARD) else EAGER
    cost = PACKED_ADAPTER if active(decisions, Site.BASE_WEIGHTS) else ADAPTER
    units = sum(linear.inputs + linear.outputs for linear in facts.model.layer_linears)
    return cost[how] * units * _width(decisions)


def loss(facts: Facts, decisions: tuple[Decision, ...]) -> float:
    """Logits, their loss and gradient, a token; the streamed executor fuses them itself."""
    how = FUSED if facts.executor == "streamed" or active(decisions, Site.LOSS) else EAGER
    return LOSS[how] * facts.model.vocab_size


def dequantised(facts: Facts, decisions: tuple[Decision, ...]) -> float:
    """All layers' quantised weights once, whatever the tokens."""
    return DEQUANTISED * facts.model.linear_params if active(decisions, Site.BASE_WEIGHTS) else 0.0


def _width(decisions: tuple[Decision, ...]) -> float:
    return 1.0 if active(decisions, Site.COMPUTE_DTYPE) else FP32_WIDTH


def named(name: str, decisions: tuple[Decision, ...]) -> bool:
    """Whether this optimization acts."""
    return any(decision.active and decision.name == name for decision in decisions)


def active(decisions: tuple[Decision, ...], site: Site) -> bool:
    """Whether something acts at this place."""
    return any(decision.active and site in decision.optimization.claims for decision in decisions)
