"""What the host does for a step, counted in operations: short contexts are bound by that, not by the device.

An operation is one of a layer's own, with what stands around it in Python: the stress test times it (elite/bench/stress_host.py). Those of
a plain layer are counted by torch's dispatcher on a CPU, forward and backward apart, views and allocations left out
(tests/plan/test_launches.py counts anew). What optimizations and executors add or spare is measured, in steps of tiny models that wait for
the host alone (host_paths.json; `python -m elite.bench.host_paths`), and divided by the time of an operation.
"""

from dataclasses import dataclass
from math import ceil

from elite.facts import FORMULA_GELU, Facts
from elite.optimizations.contract import Decision, Site
from elite.plan.across import passes
from elite.plan.traffic import Cost, active, named
from elite.streaming import Place, Streaming

PLAIN = {"gated": Cost(55, 88), "phi": Cost(57, 80)}
"""Norms, maps, rotary embedding, attention, activation and sums of one layer, no gradients of weights."""
NORMS = 2
"""Of a layer."""
WEIGHT_GRADIENTS = 1
"""A map, in the backward."""
ADAPTER = Cost(5.8, 5.2)
"""An adapted map under peft."""
FUSED_ADAPTER = Cost(7.6, 2.3)
"""The same under fused LoRA: fewer operations, and more Python around them."""
PACKED_ADAPTER = Cost(9.8, 1.1)
"""The same beside a four-bit map: both are functions of their own, and siblings are not served at once."""
DEQUANTISED = Cost(7.3, 6.1)
"""A four-bit map, besides: one kernel makes it whole, within a function of its own."""
KERNELS = {"gated": Cost(-12, -32), "phi": Cost(-9, -24)}
"""A layer whose norms, rotary embedding, activation and sums are kernels of their own, besides: four each way for some thirty operations,
each of which costs the host several of these."""
LIGER_KERNELS = {"gated": Cost(12, -11), "phi": Cost(0, 0)}
"""The same with Liger's, which has none for Phi's layers."""
CHECKPOINTED = Cost(57, 29)
"""A layer that is computed again, besides: whatever is saved passes Python, forward and backward."""
OFFLOADED = Cost(73, 35)
"""The same where its input goes to host memory."""
FEWER_SAVED = 0.7
"""Of that under fused LoRA, whose functions save fewer tensors (fitted to nos. 19 and 36 of calibration_seventh.json)."""
STREAMED = Cost(70, -10)
"""A chunk in a layer under the streamed executor, besides: staging, attention in parts, gradients added up."""
STAGED = Cost(9, 11)
"""The same where rows come from host memory or disk to a GPU: copies, streams and events."""
BLOCK = 6
"""A further block of keys in the backward of a chunk; where ranks share sequences, any block, forward and backward (assumption)."""
AROUND = Cost(100, 40)
"""Embedding, head and loss."""
UPDATE = 1.0
"""A tensor that is trained, in the gradients' norm and the optimizer's step over all tensors at once."""
UPDATE_8BIT = 2.3
"""The same with moments in 8 bits, besides: its update is a call of its own."""
AROUND_UPDATE = 46
"""The optimizer's step, whatever it trains: the device is waited for twice."""


@dataclass(frozen=True)
class Operations:
    """Of one micro-batch: one pass forward, and one backward without what is computed again."""

    forward: float
    backward: float


def operations(facts: Facts, decisions: tuple[Decision, ...], layout: Streaming | None) -> Operations:
    """What the host hands over, all layers and chunks."""
    kind = "phi" if facts.model.model_type in FORMULA_GELU else "gated"
    layer = PLAIN[kind] + _maps(facts, decisions)
    if active(decisions, Site.ELEMENTWISE):
        layer += (LIGER_KERNELS if named("liger_kernels", decisions) else KERNELS)[kind]
    if layout is not None:
        layer += STREAMED
        if layout.boundaries is not Place.device and facts.device.kind == "cuda":
            layer += STAGED
        if facts.sharing > 1:
            layer += Cost(BLOCK, BLOCK) * passes(facts, layout)
        else:
            # On average a chunk has half the sequence before it.
            layer += Cost(0, BLOCK * facts.context / 2 / layout.block)
    whole = layer * (facts.model.num_hidden_layers * chunks(facts, layout)) + AROUND
    return Operations(whole.forward, whole.backward)


def phases(facts: Facts, decisions: tuple[Decision, ...], layout: Streaming | None, again: float) -> Operations:
    """The same of a micro-batch's forward phase and of its backward phase, with what is computed again.

    Args:
        again: forward passes besides the first one; under the streamed executor all but one are part of the forward phase.
    """
    once = operations(facts, decisions, layout)
    if layout is not None:
        return Operations(again * once.forward, once.forward + once.backward)
    around = recomputing(facts, decisions)
    return Operations(once.forward + around.forward, again * once.forward + once.backward + around.backward)


def _maps(facts: Facts, decisions: tuple[Decision, ...]) -> Cost:
    """What the linear maps of a layer add: gradients of weights or adapters, and weights that are packed."""
    linears, packed = facts.model.layer_linears, active(decisions, Site.BASE_WEIGHTS)
    if facts.adapter == "lora":
        fused = PACKED_ADAPTER if packed else FUSED_ADAPTER
        each = fused if active(decisions, Site.LORA_FORWARD) else ADAPTER
        return (each + DEQUANTISED if packed else each) * len(linears)
    trained = sum(facts.adapter == "full" or linear.trained for linear in linears)
    return Cost(0, WEIGHT_GRADIENTS) * trained + DEQUANTISED * (len(linears) if packed else 0)


def recomputing(facts: Facts, decisions: tuple[Decision, ...]) -> Cost:
    """What it takes the whole executor to compute its layers again, besides their forwards."""
    if not active(decisions, Site.LAYER_ACTIVATIONS):
        return Cost(0, 0)
    each = OFFLOADED if named("checkpoint_offload", decisions) else CHECKPOINTED
    return each * (facts.model.num_hidden_layers * (FEWER_SAVED if active(decisions, Site.LORA_FORWARD) else 1.0))


def updates(facts: Facts, *, in_8_bits: bool) -> float:
    """What the host hands over in an optimizer's step."""
    if facts.adapter == "lora":
        tensors = 2 * len(facts.model.layer_linears)
    else:
        tensors = NORMS + sum(facts.adapter == "full" or linear.trained for linear in facts.model.layer_linears)
    return AROUND_UPDATE + (UPDATE + (UPDATE_8BIT if in_8_bits else 0)) * tensors * facts.model.num_hidden_layers


def chunks(facts: Facts, layout: Streaming | None) -> int:
    """Times that a pass calls each layer in a micro-batch: a row longer than a chunk is cut by itself, shorter ones are collected whole
    (elite/chunks.py)."""
    if layout is None:
        return 1
    if facts.sharing > 1:
        return ceil(facts.micro_tokens / layout.chunk)
    if facts.context > layout.chunk:
        return facts.micro_batch * ceil(facts.context / layout.chunk)
    return ceil(facts.micro_batch / (layout.chunk // facts.context))
