"""How long a step takes: floating-point operations over the device's rate. Times are for one rank; all ranks work alike.

Symbols as in `memory.py`. A multiply-add is two operations. Causal attention is counted once, at half of S²: 2·2·HD·S²/2 a
sequence and layer for scores and weighted sum. Packed documents attend less than that, so times err on the long side.
"""

from elite.facts import Facts
from elite.optimizations.contract import Decision, Site

UTILISATION = {"cuda": 0.2, "cpu": 0.8}
"""Share of the device's rate that training reaches: about what docs/measurements/first_gpu.json and quickstart_cpu.json show. Other
models and cards differ; `step_s` of finished runs says what it really was."""
FP32_RATE = {"cuda": 1 / 8, "cpu": 1.0}
"""fp32 rate over the compute dtype's (assumption: tensor cores idle in fp32; 1/2 to 1/16 from card to card)."""
ATTENTION_BACKWARD = 2.5
"""Five matrix products against the forward's two (Dao 2023): scores are recomputed."""


def _linear(facts: Facts) -> float:
    """Operations of one forward pass through the layers' linear maps, a token."""
    return 2.0 * facts.model.linear_params


def _head(facts: Facts) -> float:
    return 2.0 * facts.model.hidden_size * facts.model.vocab_size


def _adapters(facts: Facts) -> float:
    return 2.0 * facts.trainable_params if facts.adapter == "lora" else 0.0


def _attention(facts: Facts) -> float:
    """Operations of causal attention in one forward pass, a token, all layers."""
    model = facts.model
    return 2.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * facts.context


def _frozen_backward(facts: Facts) -> float:
    """Backward over forward in the base's linear maps: gradient of the input, and of the weight where it is trained."""
    return 1.0 if facts.adapter == "lora" else 2.0


def recomputed(decisions: tuple[Decision, ...]) -> tuple[float, float]:
    """Forward passes besides the first one, of the layers' linear maps and of their attention, under the whole executor."""
    again = any(d.active and Site.LAYER_ACTIVATIONS in d.optimization.claims for d in decisions)
    return (1.0, 1.0) if again else (0.0, 0.0)


def step_flops(facts: Facts, again: tuple[float, float], accumulation: int) -> float:
    """Operations that one rank carries out in one optimizer step.

    Args:
        again: forward passes besides the first one, of linear maps and of attention.
    """
    base, adapters, attention = _linear(facts) + _head(facts), _adapters(facts), _attention(facts)
    per_token = base * (1 + _frozen_backward(facts)) + 3 * adapters + attention * (1 + ATTENTION_BACKWARD)
    per_token += again[0] * (_linear(facts) + adapters) + again[1] * attention
    return per_token * facts.micro_tokens * accumulation


def step_seconds(facts: Facts, decisions: tuple[Decision, ...], again: tuple[float, float], accumulation: int) -> float:
    """Predicted duration of one optimizer step, in seconds; `again` as in `step_flops`."""
    kind = facts.device.kind
    rate = facts.device.matmul_flops_per_s * UTILISATION[kind]
    if not any(d.active and Site.COMPUTE_DTYPE in d.optimization.claims for d in decisions):
        rate *= FP32_RATE[kind]
    return step_flops(facts, again, accumulation) / rate


def model_flops_per_token(facts: Facts) -> float:
    """Operations a token that the mathematics needs, forward and backward, whatever is recomputed: for MFU.

    Chowdhery et al. 2022, appendix B, with causal attention at half (6·L·H·D·S instead of 12) and, under LoRA, without the weight
    gradients of frozen maps.
    """
    base = (_linear(facts) + _head(facts)) * (1 + _frozen_backward(facts))
    return base + 3 * _adapters(facts) + 3 * _attention(facts)
