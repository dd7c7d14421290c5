"""Flash attention.

What:   attention without the matrix of scores.
How:    torch's scaled_dot_product_attention runs a fused kernel (FlashAttention-2, cuDNN or memory-efficient, by its own order of
        preference for the machine); documents of a packed sequence are attended one by one, so no mask is ever formed. In fp32 on CUDA
        keys and values are expanded to the query heads first, as the only kernel for it shares none.
Memory: no [heads, S, S] scores: the layer keeps its output and, in fp32, one log-sum-exp a query and head instead.
Source: Dao 2023, arXiv:2307.08691; torch.nn.functional.scaled_dot_product_attention.
"""

from dataclasses import replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.parts import FP32, NUMBER_BYTES, Part, Sizes

NATIVE_GROUPS = (9, 0)
"""Compute capability from which torch prefers cuDNN, whose backward needs no keys and values expanded to the query heads."""


def log_sum_exp_bytes(heads: int, tokens: int) -> int:
    """What a layer keeps beside queries, keys, values and output: one fp32 number a query and head (Dao 2023, algorithm 1)."""
    return NUMBER_BYTES * heads * tokens


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

    def memory(self, step: Step, facts: Facts) -> Step:
        return replace(step, form=replace(step.form, attention=fused_attention))

    def apply(self, target: Any) -> Applied:
        from elite.attention import DOCUMENT_SDPA

        before = target.config._attn_implementation
        target.set_attn_implementation(DOCUMENT_SDPA)
        count = len(target.get_decoder().layers)

        def undo() -> None:
            target.set_attn_implementation(before)

        return Applied(count, "decoder layers", undo)


def _expanded(s: Sizes) -> int:
    """Keys and values for each query head, where a kernel takes no shared ones, besides."""
    return 2 * s.value * (s.queries - s.keys) * s.tokens


def fused_attention(s: Sizes, copied: bool) -> Part:
    """Queries, keys, values, output and log-sum-exps; the backward sums dQ in fp32 on CUDA.

    Args:
        copied: the output map reads a copy of the output in another order, which then is its own to keep.
    """
    numbers = log_sum_exp_bytes(s.facts.model.num_attention_heads, s.tokens)
    rows, out = s.value * (s.queries + 2 * s.keys) * s.tokens, s.value * s.queries * s.tokens
    capability = s.facts.device.compute_capability
    expands = s.on_cuda and s.keys < s.queries and capability is not None and capability < NATIVE_GROUPS
    work = FP32 * s.queries * s.tokens + numbers if s.on_cuda else 0.0
    window = s.facts.model.sliding_window
    if window is not None and window < s.facts.context and s.facts.executor == "whole":
        # Keys and values stand there for each query head, and the outputs of blocks of queries are put together.
        copied = True
        rows += _expanded(s)
    elif s.on_cuda and not s.half:
        rows += _expanded(s)
    return Part(
        "attention",
        saved=rows + out + numbers,
        small=numbers,
        keeps_output=not copied,
        forward=out if copied else 0.0,
        arrives=out,
        leaves=rows,
        work=max(work, 2 * out) if expands else work,
    )
