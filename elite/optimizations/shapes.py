"""What several memory formulas read off a model's shape. f is the MLP's width; a *value* is one number of the compute dtype."""

from collections.abc import Iterable

from elite.facts import FORMULA_GELU, Facts, LinearShape
from elite.optimizations.contract import Estimate


def split(linears: Iterable[LinearShape]) -> tuple[list[LinearShape], list[LinearShape]]:
    """The attention's and the MLP's linear maps, each with its output map last."""
    attention: list[LinearShape] = []
    mlp: list[LinearShape] = []
    for linear in linears:
        (attention if "attn" in linear.name or "attention" in linear.name else mlp).append(linear)
    return attention, mlp


def mlp_width(facts: Facts) -> int:
    """f; 0 for a layer without MLP."""
    _, mlp = split(facts.model.layer_linears)
    return mlp[-1].inputs if mlp else 0


def is_gated(facts: Facts) -> bool:
    """Whether the maps into the MLP make two factors of the product that its output map reads."""
    _, mlp = split(facts.model.layer_linears)
    return sum(linear.outputs for linear in mlp[:-1]) >= 2 * mlp_width(facts)


def mlp_values(facts: Facts) -> int:
    """Values a token that one layer's MLP keeps for its backward, between its input and its output map: (factors + 1) f."""
    factors = 3 if is_gated(facts) else 4 if facts.model.model_type in FORMULA_GELU else 1
    return (factors + 1) * mlp_width(facts)


def formula_gelu_bytes(facts: Facts) -> int:
    """Bytes a token and layer that mixed precision adds to a GELU written as a formula: CUDA's autocast takes its power to fp32, and
    three of its four factors with it."""
    return 3 * 2 * mlp_width(facts) if facts.device.kind == "cuda" and facts.model.model_type in FORMULA_GELU else 0


def adapter_rank(facts: Facts) -> int:
    """Rank of the adapters, from their parameter count."""
    return facts.trainable_params // facts.model.lora_params(1) if facts.adapter == "lora" else 0


def input_bytes(estimate: Estimate) -> float:
    """One layer's input [tokens, hidden] in the compute dtype: `layer_workspace` holds two of them."""
    return estimate.layer_workspace / 2


def stream_value_bytes(value: float, facts: Facts) -> float:
    """Bytes of a value of the residual stream, for values of `value` bytes in the compute dtype: it begins with the embeddings, and those
    are fp32 where they are trained."""
    return max(value, 4) if facts.adapter == "full" else value


def value_bytes(estimate: Estimate, facts: Facts) -> float:
    """Bytes of a value."""
    return input_bytes(estimate) / (facts.model.hidden_size * facts.micro_tokens)
