"""Ring attention: ranks share each sequence.

What:   each rank carries 1/R of every sequence through the model, and attention sees all of it, exactly, forward and backward.
How:    rows are dealt zigzag (elite/zigzag.py), labels and positions with them. Keys and values of the other ranks go round while
        attention is at work (`ring`), or come all at once (`all_gather`: fewer, larger messages, for few key/value heads); partial results
        are merged by their log-sum-exp (elite/distributed/ring.py; under the streamed executor elite/executor/streamed/rounds.py). The
        loss is a mean over the label tokens of all ranks. Ranks do not divide the batch among them then. Validation is shared, too;
        generation and the losses that order a curriculum are not, and before the first step each rank tries its part alone.
Memory: everything that grows with the context is divided by R. Attention holds besides: forward the output in fp32 and a block of keys
        and values, backward dQ in fp32, a block and two blocks of gradients in fp32; with all_gather R blocks of each. Under the
        streamed executor: elite/plan/across.py.
Source: Liu et al. 2023, arXiv:2310.01889; Brandon et al. 2023, arXiv:2311.09431 (balanced dealing).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

from elite.errors import PlanError
from elite.facts import Facts
from elite.optimizations.contract import (
    Applied,
    Behind,
    Decision,
    Exactness,
    Exchange,
    Optimization,
    OptimizationConfig,
    Passes,
    Site,
    Stage,
    Step,
)
from elite.optimizations.flash_attention import log_sum_exp_bytes
from elite.optimizations.parts import FP32, Part, Sizes


class Variant(Enum):
    """How keys and values of other ranks come."""

    ring = "ring"
    """From neighbour to neighbour, one block at a time, while the block before is at work."""
    all_gather = "all_gather"
    """All at once, before anything is attended."""


class RingAttention(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        variant: Variant = Variant.ring

    name = "ring_attention"
    title = "ring attention (ranks share each sequence)"
    row = 42
    stage = Stage.model
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.SEQUENCE})
    source = "Liu et al. 2023"

    def check(self, facts: Facts) -> str | None:
        if facts.device.count == 1:
            return "one rank has no other to share a sequence with (hardware.gpus)"
        model, window = facts.model, facts.model.sliding_window
        reason = f"a window of {window:,} tokens" if window is not None and window < facts.context else ""
        reason = reason or model.unstreamable or ""
        if facts.context < 2 * facts.device.count:
            reason = f"{facts.device.count} ranks take two pieces each of {facts.context} tokens"
        if reason:
            # Sharing decides how many sequences make a step: no run goes on without it as if nothing had been asked.
            problem = f"optimizations.ring_attention: ranks cannot share sequences of {model.name} ({reason})"
            raise PlanError(problem, "optimizations.ring_attention.enabled=false")
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        blocks = 1 if self.config.variant is Variant.ring else facts.sharing

        def attention(s: Sizes, copied: bool) -> Part:
            return shared_attention(s, copied, blocks)

        return replace(step, form=replace(step.form, attention=attention))

    def exchange(self, passes: Passes, facts: Facts) -> Exchange:
        """As elite/distributed/ring.py has it: keys and values in every pass, and their fp32 gradients in the backward."""
        model, ranks, around = facts.model, facts.sharing, self.config.variant is Variant.ring
        values = 2 * model.num_key_value_heads * model.head_dim * facts.micro_tokens
        blocks, sums = (passes.forwards + 1) * (ranks - 1) * passes.value, (ranks if around else ranks - 1) * FP32
        sent = passes.count * model.num_hidden_layers * values * (blocks + sums)
        return Exchange("keys and values", sent, sent, Behind.attention if around else Behind.nothing)

    def apply(self, target: Any) -> Applied:
        from elite.attention import DOCUMENT_SDPA

        # What takes rows that are not shared, too.
        before = target.config._attn_implementation
        target.set_attn_implementation(DOCUMENT_SDPA)

        def undo() -> None:
            target.set_attn_implementation(before)

        return Applied(len(target.get_decoder().layers), f"decoder layers, {self.config.variant.value}", undo)


def active_variant(decisions: Iterable[Decision]) -> Variant | None:
    """How ranks that share each sequence exchange keys and values; None where none do."""
    chosen = (decision.optimization.config.variant for decision in decisions if decision.active and decision.name == RingAttention.name)
    return next(chosen, None)


def shared_attention(s: Sizes, copied: bool, blocks: int) -> Part:
    """Queries, a copy of keys and values, output and log-sum-exps; partial results and gradients are summed in fp32.

    Args:
        copied: the output map reads a copy of the output in another order.
        blocks: of other ranks' keys and values at once.
    """
    numbers = log_sum_exp_bytes(s.facts.model.num_attention_heads, s.tokens)
    block, sums = 2 * s.value * s.keys * s.tokens, 2 * FP32 * s.keys * s.tokens
    rows, out = s.value * s.queries * s.tokens + block, s.value * s.queries * s.tokens
    wide = FP32 * s.queries * s.tokens
    return Part(
        "attention",
        saved=rows + out + numbers,
        small=numbers,
        keeps_output=not copied,
        forward=wide + blocks * block + (out if copied else 0.0),
        arrives=out,
        leaves=rows,
        work=wide + blocks * block + max(2, blocks) * sums,
    )
