"""How many operations the host hands to the device in a step: short contexts are bound by that, not by the device.

An operation is one of a layer's own, with what stands around it in Python; lighter ones are parts of one. Counts are of torch's dispatcher
on a CPU, a layer's forward and backward apart, views and allocations left out (tests/plan/test_launches.py counts anew). What only a CUDA
device runs is counted by what it replaces.
"""

from dataclasses import dataclass
from math import ceil

from elite.facts import FORMULA_GELU, Facts
from elite.optimizations.contract import Decision, Site
from elite.plan.across import passes
from elite.plan.traffic import Cost, active
from elite.streaming import Place, Streaming

PLAIN = {"gated": Cost(55, 88), "phi": Cost(57, 80)}
"""Norms, maps, rotary embedding, attention, activation and sums of one layer, no gradients of weights."""
NORMS = 2
"""Of a layer."""
WEIGHT_GRADIENTS = 1
"""A map, in the backward."""
ADAPTER = Cost(6, 4.5)
"""An adapted map under peft."""
ADAPTER_WEIGHT = 0.7
"""Of the host's time for an operation: bare products and sums, without modules, hooks and interfaces around them (fitted to steps of
SmolLM2 and Phi-2 that wait for the host, of first_gpu.json and ablation_smollm2_4k.json)."""
FUSED_ADAPTER = Cost(-1, 4.5)
"""The same under fused LoRA, whose functions convert nothing that is in the compute dtype already and serve siblings at once."""
PACKED_ADAPTER = Cost(2.5, 6)
"""The same beside a four-bit map: both are functions of their own, and siblings are not served at once (fitted to extreme_phi2.json and to
steps of calibration_sixth.json and calibration_seventh.json that wait for the host)."""
DEQUANTISED = Cost(3.5, 3.5)
"""A four-bit map, besides: one kernel makes it whole, within a function of its own (assumption, that extreme_phi2.json and
calibration_profile.json agree with; bitsandbytes' several operations, dispatched in Python, were six by calibration_fourth.json)."""
FUSED_ELEMENTWISE = Cost(-19, -25)
"""A layer whose norms, rotary embedding, activation and sums are kernels of their own, besides: four each way for some thirty operations,
and each costs the host about three of these (fitted to calibration_fourth.json and fused_steps.json, and to nothing older, whose backwards
ran in another thread; Liger's alike)."""
STREAMED = Cost(48, 5)
"""A chunk in a layer under the streamed executor, besides: staging, attention in parts, gradients added up."""
STREAMED_WEIGHT = 0.62
"""As `ADAPTER_WEIGHT` (fitted to the streamed steps of calibration_profile.json that wait for the host)."""
STAGED = Cost(36, 0)
"""The same where rows come from host memory or disk to a GPU: copies, streams and events, which no CPU's count has (fitted to all streamed
steps of calibration_fit, _first, _second and _third.json; weighted as `STREAMED`, with which calibration_sixth.json agrees better)."""
BLOCK = 6
"""A further block of keys in the backward of a chunk; where ranks share sequences, any block, forward and backward (assumption)."""
AROUND = Cost(55, 20)
"""Embedding, head and loss."""
UPDATE_8BIT = 1.25
"""A tensor that is trained with moments in 8 bits, whose update is a call of its own (assumption, that extreme_phi2.json and
calibration_profile.json agree with)."""


@dataclass(frozen=True)
class Operations:
    """Of one micro-batch: one pass forward, and one backward without what is computed again."""

    forward: float
    backward: float


def operations(facts: Facts, decisions: tuple[Decision, ...], layout: Streaming | None) -> Operations:
    """What the host hands over, all layers and chunks."""
    kind = "phi" if facts.model.model_type in FORMULA_GELU else "gated"
    maps, layer = len(facts.model.layer_linears), PLAIN[kind]
    if facts.adapter == "full":
        layer += Cost(0, WEIGHT_GRADIENTS) * maps
    elif facts.adapter == "converted":
        layer += Cost(0, WEIGHT_GRADIENTS) * sum(linear.trained for linear in facts.model.layer_linears)
    else:
        fused = PACKED_ADAPTER if active(decisions, Site.BASE_WEIGHTS) else FUSED_ADAPTER
        layer += (fused if active(decisions, Site.LORA_FORWARD) else ADAPTER * ADAPTER_WEIGHT) * maps
    if active(decisions, Site.ELEMENTWISE):
        layer += FUSED_ELEMENTWISE
    if active(decisions, Site.BASE_WEIGHTS):
        layer += DEQUANTISED * maps
    if layout is not None:
        layer += STREAMED * STREAMED_WEIGHT
        if layout.boundaries is not Place.device and facts.device.kind == "cuda":
            layer += STAGED * STREAMED_WEIGHT
        if facts.sharing > 1:
            layer += Cost(BLOCK, BLOCK) * passes(facts, layout)
        else:
            # On average a chunk has half the sequence before it.
            layer += Cost(0, BLOCK * facts.context / 2 / layout.block)
    whole = layer * (facts.model.num_hidden_layers * chunks(facts, layout)) + AROUND
    return Operations(whole.forward, whole.backward)


def updates(facts: Facts) -> float:
    """What the host hands over in an optimizer's step with moments in 8 bits."""
    if facts.adapter == "lora":
        tensors = 2 * len(facts.model.layer_linears)
    else:
        tensors = NORMS + sum(facts.adapter == "full" or linear.trained for linear in facts.model.layer_linears)
    return UPDATE_8BIT * tensors * facts.model.num_hidden_layers


def chunks(facts: Facts, layout: Streaming | None) -> int:
    """Times that a pass calls each layer in a micro-batch."""
    return 1 if layout is None else ceil(facts.micro_tokens / layout.chunk)
