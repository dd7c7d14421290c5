"""How long a prompt generation has room for beside what training holds. Bytes.

Symbols as in `memory.py`; v bytes of a value, h of a hidden value (fp32 where the weights are). A token of the prompt takes

    L · 2KDv                        keys and values of all layers, until the end
    2KDv                            one layer's again, while the cache grows by a token
    4dh + 3fv + (3H + 4K)Dv         the layer at work: hidden states, the MLP, queries, keys and values, attention's output and, where a
                                    kernel wants them so, keys and values expanded to the query heads
"""

from elite.facts import Facts
from elite.optimizations.contract import Decision, Estimate
from elite.optimizations.shapes import mlp_width

HIDDEN_COPIES = 4
"""Hidden states at once: a layer's input, its norm, a sum, an output."""


def token_bytes(facts: Facts, decisions: tuple[Decision, ...]) -> float:
    """Bytes a token of the prompt, see the module's docstring."""
    model = facts.model
    half = any(decision.active and decision.name == "mixed_precision" for decision in decisions)
    value = 2 if half else 4
    hidden = 4 if facts.adapter == "full" else value
    heads, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    cache = (model.num_hidden_layers + 1) * 2 * keys * value
    work = HIDDEN_COPIES * model.hidden_size * hidden + (3 * mlp_width(facts) + 3 * heads + 4 * keys) * value
    return cache + work


def generation_tokens(facts: Facts, decisions: tuple[Decision, ...], estimate: Estimate, usable_bytes: float) -> int:
    """Tokens of prompt and continuation for which there is room, at most the context.

    Args:
        estimate: of training, whose weights, optimizer state and, under the streamed executor, rows on the device stay.
        usable_bytes: device memory, headroom taken off.
    """
    stays = estimate.linear_weights + estimate.other_weights + estimate.trainable_copy + estimate.gradients + estimate.optimizer_state
    stays += estimate.keys_values + estimate.staging + estimate.runtime
    room = max(0.0, usable_bytes - stays)
    return min(facts.context, int(room / token_bytes(facts, decisions)))
