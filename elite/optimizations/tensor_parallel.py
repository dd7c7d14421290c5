"""Tensor parallelism: ranks divide each layer.

What:   each of R ranks holds 1/R of every decoder layer's linear maps, of its heads and of its MLP's width, and all carry the same
        sequences: they do not divide the batch among them. Embedding, norms and head stay whole on each.
How:    the architecture's own plan in transformers (`base_model_tp_plan`) says which maps are divided by their outputs (`colwise`) and
        which by their inputs (`rowwise`), whose partial results are summed over the ranks; torch's tensor parallelism carries it out.
        Adapters of a map are divided with it. A checkpoint holds whole weights, as one rank writes them. Parts that act on whole tensors
        (their own optimizer, averages, compiled layers …) are inactive.
Memory: weights of the layers' maps, their gradients and optimizer state, and what grows with heads or the MLP's width are divided by R.
        A sum over ranks takes what it sums once more meanwhile. There is no second copy of the gradients.
Source: Shoeybi et al. 2019, arXiv:1909.08053; torch.distributed.tensor.parallel; transformers' `base_model_tp_plan`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from elite.errors import PlanError
from elite.facts import Facts, LinearShape, ModelShape
from elite.optimizations.contract import Applied, Behind, Exactness, Exchange, Optimization, Passes, Site, Stage, Step, summed
from elite.optimizations.parts import Part, Sizes
from elite.optimizations.shapes import PARALLEL_BLOCKS, adapter_rank, split

BY_OUTPUTS, BY_INPUTS, SUMMED = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""Styles of transformers' plans that are carried out: two of linear maps, and norms of heads that ranks have whole."""


class TensorParallel(Optimization):
    """See the module's docstring."""

    name = "tensor_parallel"
    title = "tensor parallelism (ranks divide each layer)"
    row = 50
    stage = Stage.model
    exactness = Exactness.EQUAL
    # Packed weights and sequences that are shared belong to one rank as a whole, and converted heads are counted on one.
    claims: ClassVar[frozenset[Site]] = frozenset({Site.LAYER_SHARES, Site.SEQUENCE, Site.BASE_WEIGHTS, Site.KV_HEADS})
    source = "Shoeybi et al. 2019; torch"

    def check(self, facts: Facts) -> str | None:
        if facts.device.count == 1:
            return "one rank has no other to divide layers with (hardware.gpus)"
        reason = "" if facts.dividing > 1 else refusal(facts.model, facts.device.count)
        if facts.device.kind == "cuda" and not facts.device.supports_bf16:
            reason = f"{facts.device.name} has no bf16, and fp16's loss scaling judges each rank's gradients apart"
        if facts.executor == "streamed":
            reason = "the streamed executor brings a whole layer to each rank"
        if reason:
            # Dividing decides how many sequences make a step: no run goes on without it as if nothing had been asked.
            remedy = "executor=whole" if facts.executor == "streamed" else f"optimizations.{self.name}.enabled=false"
            raise PlanError(f"optimizations.{self.name}: {facts.device.count} ranks cannot divide {facts.model.name}: {reason}", remedy)
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        plan, before = dict(facts.model.tensor_plan), step.form.maps

        def maps(s: Sizes, linears: Sequence[LinearShape], read: float, kept: bool) -> Part:
            part, summed = before(s, linears, read, kept), s.value * s.d * s.tokens
            if plan.get(linears[0].name) == BY_INPUTS:
                return replace(part, forward=part.forward + summed)
            return replace(part, work=part.work + summed)

        return replace(step, form=replace(step.form, maps=maps))

    def exchange(self, passes: Passes, facts: Facts) -> Exchange:
        """Forward the partial results of maps divided by inputs, backward the gradients of what maps divided by outputs read."""
        model, rank, plan = facts.model, adapter_rank(facts), dict(facts.model.tensor_plan)
        styles = [plan[linear.name] for linear in model.layer_linears]
        ahead, behind = styles.count(BY_INPUTS), styles.count(BY_OUTPUTS)
        layers = model.num_hidden_layers
        rows = layers * (passes.forwards * ahead + behind) * model.hidden_size
        # An adapter's low-rank values, likewise.
        rows += layers * rank * (passes.forwards * ahead + behind)
        if facts.adapter == "lora":
            # No gradient goes below the first layer's norm.
            rows -= _first_readers(model, plan) * model.hidden_size
        return summed("partial results", passes.count * passes.value * rows * facts.micro_tokens, facts.dividing, Behind.nothing)

    def apply(self, target: Any) -> Applied:
        from elite.optimizations.functions.divided import divide

        return Applied(divide(target, target.config.base_model_tp_plan), "linear maps are divided")


def _first_readers(model: ModelShape, plan: dict[str, str]) -> int:
    """Maps divided by outputs that read a layer's first norm."""
    attention, mlp = split(model.layer_linears)
    readers = [*attention, *(mlp if model.model_type in PARALLEL_BLOCKS else [])]
    return sum(plan[linear.name] == BY_OUTPUTS for linear in readers)


def refusal(model: ModelShape, ranks: int) -> str:
    """Why so many ranks cannot divide this model's layers; empty if they can."""
    plan = dict(model.tensor_plan)
    if not plan:
        return f"transformers has no plan for {model.model_type}"
    unknown = sorted({style for style in plan.values() if style not in (BY_OUTPUTS, BY_INPUTS, SUMMED)})
    if unknown:
        return f"transformers' plan for {model.model_type} asks for {', '.join(unknown)}, which is not carried out here"
    left = [linear.name for linear in model.layer_linears if linear.name not in plan]
    if left:
        return f"transformers' plan for {model.model_type} leaves out {', '.join(left)}"
    for what, count in (("attention heads", model.num_attention_heads), ("key/value heads", model.num_key_value_heads)):
        if count % ranks:
            return f"its {count} {what} are no multiple of {ranks}"
    uneven = [linear for linear in model.layer_linears if _size(linear, plan) % ranks]
    return f"the {_size(uneven[0], plan):,} rows of {uneven[0].name} are no multiple of {ranks}" if uneven else ""


def divided(model: ModelShape, ranks: int) -> ModelShape:
    """What one of so many ranks has of a model that they can divide."""
    plan = dict(model.tensor_plan)
    linears = tuple(_share(linear, plan[linear.name], ranks) for linear in model.layer_linears)
    fewer = sum(linear.params for linear in model.layer_linears) - sum(linear.params for linear in linears)
    return replace(
        model,
        intermediate_size=model.intermediate_size // ranks,
        num_attention_heads=model.num_attention_heads // ranks,
        num_key_value_heads=model.num_key_value_heads // ranks,
        layer_linears=linears,
        layer_params=model.layer_params - fewer,
        total_params=model.total_params - model.num_hidden_layers * fewer,
        loaded=model.as_loaded,
    )


def _size(linear: LinearShape, plan: dict[str, str]) -> int:
    return linear.outputs if plan[linear.name] == BY_OUTPUTS else linear.inputs


def _share(linear: LinearShape, style: str, ranks: int) -> LinearShape:
    # A bias is added to the sum, and whole on each rank.
    if style == BY_OUTPUTS:
        return replace(linear, outputs=linear.outputs // ranks)
    return replace(linear, inputs=linear.inputs // ranks)
