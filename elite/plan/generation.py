"""How long a prompt generation has room for beside what stays on the device. Bytes.

Symbols as in `memory.py`; v bytes of a value, h of a hidden value (fp32 where the weights are); n continuations of c tokens. The layer at
work takes, for each token that it is given,

    w = 4dh + 3fv + (3H + 4K)Dv     hidden states, the MLP, queries, keys and values, attention's output and, where a kernel wants them so,
                                    keys and values expanded to the query heads

Dense: all n sequences are read at once, and a token of each takes

    (L + 1) · 2KDv + w              keys and values of all layers until the end, one layer's again while the cache grows by a token

Paged (optimizations.paged_attention): the prompt is read once, q tokens at a time. A token of it takes, however many continuations
share it,

    L · 2KDv + (2K + 2H)Dv + qv     its pages; one layer's keys and values gathered, and expanded to the query heads; the mask

and beside the prompt there are, with pages of p tokens, n · (c + p) + 2p tokens of pages, and q · (w + qv) for the piece at work.
"""

from dataclasses import dataclass

from elite.facts import Facts
from elite.optimizations.contract import Decision, Estimate
from elite.optimizations.shapes import mlp_width
from elite.plan.memory import folded
from elite.plan.traffic import named

HIDDEN_COPIES = 4
"""Hidden states at once: a layer's input, its norm, a sum, an output."""
SPARE_PAGES = 2
"""Pages that the library keeps for padding."""


@dataclass(frozen=True)
class _Sizes:
    cache: float
    """Keys and values of a token, all layers."""
    gathered: float
    """Those of one layer, as they are and expanded to the query heads."""
    work: float
    """What the layer at work takes for a token."""
    value: int


def _sizes(facts: Facts, decisions: tuple[Decision, ...]) -> _Sizes:
    model, full = facts.model, facts.adapter == "full"
    half = named("mixed_precision", decisions)
    # Pages have the dtype of the weights, and so does everything that reads them.
    value = 2 if half and not (full and pages(decisions)) else 4
    hidden = 4 if full else value
    heads, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    work = HIDDEN_COPIES * model.hidden_size * hidden + (3 * mlp_width(facts) + 3 * heads + 4 * keys) * value
    return _Sizes(model.num_hidden_layers * 2 * keys * value, 2 * (keys + heads) * value, work, value)


def pages(decisions: tuple[Decision, ...]) -> tuple[int, int] | None:
    """Tokens of a page and of a piece of the prompt, where generation has pages."""
    found = [d.optimization.config for d in decisions if d.active and d.name == "paged_attention"]
    return (found[0].page, found[0].piece) if found else None


def token_bytes(facts: Facts, decisions: tuple[Decision, ...], count: int = 1) -> float:
    """Bytes a token of the prompt, see the module's docstring.

    Args:
        count: continuations of it.
    """
    sizes, paged = _sizes(facts, decisions), pages(decisions)
    if paged:
        return sizes.cache + sizes.gathered + paged[1] * sizes.value
    return count * (sizes.cache + sizes.cache / facts.model.num_hidden_layers + sizes.work)


def fixed_bytes(facts: Facts, decisions: tuple[Decision, ...], count: int = 1, new: int = 0) -> float:
    """Bytes that do not grow with the prompt, `count` continuations of `new` tokens among them."""
    sizes, paged = _sizes(facts, decisions), pages(decisions)
    if not paged:
        return new * token_bytes(facts, decisions, count)
    page, piece = paged
    return (count * (new + page) + SPARE_PAGES * page) * sizes.cache + piece * (sizes.work + piece * sizes.value)


def generation_tokens(
    facts: Facts, decisions: tuple[Decision, ...], estimate: Estimate, usable_bytes: float, count: int = 1, new: int = 0
) -> int:
    """Tokens of prompt and, for one continuation, its own for which there is room, at most the context.

    Args:
        estimate: of training, whose weights, optimizer state and, under the streamed executor, rows on the device stay.
        usable_bytes: device memory, headroom taken off.
        count: continuations of the prompt at once.
        new: tokens of each; 0 leaves them to the caller, out of what is returned.
    """
    stays = estimate.linear_weights + estimate.other_weights + estimate.trainable_copy + estimate.gradients + estimate.optimizer_state
    stays += estimate.keys_values + estimate.staging + estimate.runtime + folded(facts, decisions).map_at_work
    room = max(0.0, usable_bytes - stays - fixed_bytes(facts, decisions, count, new))
    return min(facts.context, new + int(room / token_bytes(facts, decisions, count)))
