"""What several memory formulas read off a model's shape. f is the MLP's width."""

from collections.abc import Iterable

from elite.facts import Facts, LinearShape

ALIGNMENT = 8
"""Tensor cores want inner dimensions that are a multiple of this many half-precision values."""
PARALLEL_BLOCKS = frozenset({"phi", "cohere", "cohere2"})
"""Architectures whose attention and MLP read the same norm."""


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


def layer_maps(facts: Facts) -> tuple[list[LinearShape], LinearShape, list[LinearShape], LinearShape | None]:
    """Projections of the attention and its output map; maps into the MLP and its output map, None for a layer without MLP."""
    attention, mlp = split(facts.model.layer_linears)
    return attention[:-1], attention[-1], mlp[:-1], mlp[-1] if mlp else None


def adapter_rank(facts: Facts) -> int:
    """Rank of the adapters, from their parameter count."""
    return facts.trainable_params // facts.model.lora_params(1) if facts.adapter == "lora" else 0


def stream_value_bytes(value: int, facts: Facts) -> int:
    """Bytes of a value of the residual stream, for values of `value` bytes in the compute dtype: it begins with the embeddings, and those
    are fp32 where they are trained."""
    return max(value, 4) if facts.adapter == "full" else value


def largest_trained(facts: Facts) -> int:
    """Values of the largest tensor that is trained."""
    linears = facts.model.layer_linears
    if facts.adapter == "lora":
        return adapter_rank(facts) * max(max(linear.inputs, linear.outputs) for linear in linears)
    return max(facts.model.embedding_params, *(linear.inputs * linear.outputs for linear in linears))


def trained_in_tensors_of(facts: Facts, least: int) -> int:
    """Trained values in tensors of so many elements at least; in full fine-tuning linear maps, embedding and head."""
    model, linears = facts.model, facts.model.layer_linears
    if facts.adapter == "lora":
        rank = adapter_rank(facts)
        sizes = [rank * width for linear in linears for width in (linear.inputs, linear.outputs)]
    else:
        sizes = [linear.inputs * linear.outputs for linear in linears]
    outer = model.embedding_params * (1 if model.tied else 2) if facts.adapter == "full" and model.embedding_params >= least else 0
    return model.num_hidden_layers * sum(size for size in sizes if size >= least) + outer
