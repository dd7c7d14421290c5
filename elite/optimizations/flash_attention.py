"""Flash attention.

What:   attention without the matrix of scores.
How:    torch's scaled_dot_product_attention runs a fused kernel (FlashAttention-2, cuDNN or memory-efficient, by its own order of
        preference for the machine); documents of a packed sequence are attended one by one, so no mask is ever formed.
Memory: no [heads, S, S] scores: the layer keeps its output and, in fp32, one log-sum-exp a query and head instead.
Source: Dao 2023, arXiv:2307.08691; torch.nn.functional.scaled_dot_product_attention.
"""

from dataclasses import replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Estimate, Exactness, Optimization, Site, Stage


def log_sum_exp_bytes(facts: Facts) -> int:
    """What all layers keep beside queries, keys, values and output: one fp32 number a query and head (Dao 2023, algorithm 1)."""
    return 4 * facts.model.num_hidden_layers * facts.model.num_attention_heads * facts.micro_tokens


class FlashAttention(Optimization):
    """See the module's docstring."""

    name = "flash_attention"
    title = "fused attention (FlashAttention-2 and its peers)"
    row = 1
    stage = Stage.model
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.ATTENTION})
    source = "Dao 2023"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, estimate: Estimate, facts: Facts) -> Estimate:
        return replace(estimate, attention_scores=0.0, saved_activations=estimate.saved_activations + log_sum_exp_bytes(facts))

    def apply(self, target: Any) -> Applied:
        from elite.attention import DOCUMENT_SDPA

        before = target.config._attn_implementation
        target.set_attn_implementation(DOCUMENT_SDPA)
        count = len(target.get_decoder().layers)

        def undo() -> None:
            target.set_attn_implementation(before)

        return Applied(count, "decoder layers", undo)
