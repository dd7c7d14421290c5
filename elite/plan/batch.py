"""How sequences make an optimizer step."""

from dataclasses import dataclass, replace

from elite.config import AdapterMethod, RunConfig
from elite.errors import PlanError
from elite.facts import Device, Facts, ModelShape
from elite.optimizations import reshaped
from elite.optimizations.gqa_conversion import GQAConversion
from elite.optimizations.ring_attention import RingAttention
from elite.optimizations.tensor_parallel import divided, refusal
from elite.optimizations.zero_3 import ZeRO3
from elite.streaming import WeightPlace

CONTEXT_MULTIPLE = 8
"""Tensor cores and 8-byte aligned rows want it."""
MIN_CONTEXT = 64
SHARED_WORD = f"optimizations.{RingAttention.name}.enabled=true"


@dataclass(frozen=True)
class BatchGeometry:
    """One optimizer step."""

    accumulation: int
    """Micro-batches on each rank."""
    step_tokens: int
    """Token slots of all ranks together."""
    note: str
    """What differs from what was asked; empty if nothing does."""


def facts_of(config: RunConfig, device: Device, shape: ModelShape, executor: str = "whole") -> Facts:
    """What optimizations may ask about this run under one executor; the model is the one that they make of the loaded one.

    Raises:
        PlanError: what should be converted cannot be.
    """
    shape = reshaped(config.optimizations, shape)
    if config.adapter.method is AdapterMethod.converted:
        shape = _marked(config, shape)
    ranks = dividing(config, device)
    if ranks > 1 and refusal(shape, ranks):
        # Which the part itself says.
        ranks = 1
    shape = divided(shape, ranks) if ranks > 1 else shape
    facts = Facts(
        model=shape,
        device=device,
        context=config.tier.context,
        micro_batch=config.training.sequences,
        trainable_params=_trainable(config, shape),
        adapter=config.adapter.method.value,
        executor=executor,
        accumulation=max(1, sequences_of_a_rank(config, device) // config.training.sequences),
        host_weights=config.executor.weights is WeightPlace.streamed,
        journal=config.training.mid_step_checkpoint,
        generates=config.training.completion_tokens > 0,
        sharing=sharing(config, device),
        dividing=ranks,
    )
    # Text is written by one rank, and that has parts of the weights alone.
    zero = config.optimizations.zero_3
    return replace(facts, generates=False) if zero.enabled and ZeRO3(zero).check(facts) is None else facts


def sharing(config: RunConfig, device: Device) -> int:
    """Ranks that share each sequence; 1: none is shared."""
    return device.count if config.optimizations.ring_attention.enabled else 1


def with_shared_sequences(config: RunConfig, device: Device) -> RunConfig | None:
    """The run with ranks that share each sequence; None where there is one rank, or ranks carry the same sequences already."""
    if device.count == 1 or max(sharing(config, device), dividing(config, device)) > 1:
        return None
    return replace(config, optimizations=config.optimizations.switched({RingAttention.name: True}))


def dividing(config: RunConfig, device: Device) -> int:
    """Ranks that divide each layer and carry the same sequences; 1: each has all of it."""
    return device.count if config.optimizations.tensor_parallel.enabled else 1


def _replicas(config: RunConfig, device: Device) -> int:
    """Ranks, or groups of ranks, that carry different sequences."""
    return device.count // max(sharing(config, device), dividing(config, device))


def _trainable(config: RunConfig, shape: ModelShape) -> int:
    if config.adapter.method is AdapterMethod.lora:
        return shape.lora_params(config.adapter.rank)
    return shape.total_params if config.adapter.method is AdapterMethod.full else shape.trained_linear_params


def _marked(config: RunConfig, shape: ModelShape) -> ModelShape:
    """The shape with the converted maps marked, which are all that is trained."""
    conversion = GQAConversion(config.optimizations.gqa_conversion)
    if shape.num_key_value_heads == shape.as_loaded.num_key_value_heads:
        raise PlanError(
            f"adapter.method=converted trains what optimizations.gqa_conversion converts, and of {shape.name}'s "
            f"{shape.num_key_value_heads} key/value heads it converts none",
            f"optimizations.gqa_conversion.enabled=true and a kv_heads that divides {shape.num_key_value_heads}",
        )
    return conversion.converted(shape)


def batch_geometry(config: RunConfig, device: Device) -> BatchGeometry:
    """Micro-batches in a step.

    Raises:
        PlanError: context, target and global batch do not go together.
    """
    tier, training = config.tier, config.training
    context = tier.context
    if context % CONTEXT_MULTIPLE or context < MIN_CONTEXT:
        nearest = max(MIN_CONTEXT, round(context / CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE)
        rule = f"must be a multiple of {CONTEXT_MULTIPLE}, at least {MIN_CONTEXT}"
        raise PlanError(f"tier.context={context}: {rule}", f"tier.context={nearest}")
    if tier.target_length >= context:
        raise PlanError(
            f"tier.target_length={tier.target_length} leaves no context before the target in tier.context={context}",
            f"tier.target_length={context // 8}",
        )
    replicas = _replicas(config, device)
    wanted, unit = training.global_batch_tokens, context * training.sequences * replicas
    if wanted <= unit:
        less = f"training.global_batch_tokens={wanted} is less than one micro-batch on each rank: a step takes {unit} tokens"
        return BatchGeometry(1, unit, less if wanted < unit else "")
    if wanted % unit:
        near = max(1, round(wanted / unit)) * unit
        raise PlanError(
            f"training.global_batch_tokens={wanted} is not a multiple of context × micro_batch × "
            f"{'ranks' if replicas == device.count else 'groups of ranks'} = {context} × {training.sequences} × {replicas} = {unit}",
            f"training.global_batch_tokens={near}",
        )
    return BatchGeometry(wanted // unit, wanted, "")


def sequences_of_a_rank(config: RunConfig, device: Device) -> int:
    """Sequences that each rank, alone or with others, carries through one optimizer step, whatever the micro-batch; one at least."""
    return max(1, config.training.global_batch_tokens // (config.tier.context * _replicas(config, device)))


def accumulation_for(sequences: int, largest: int) -> int:
    """Fewest micro-batches of one size, none above `largest` sequences, that make up `sequences`: the global batch stays what it is.

    One size, because kernels are compiled for a shape and the gradient's sum should not depend on which sequences come last.
    """
    return next(n for n in range(-(-sequences // largest), sequences + 1) if sequences % n == 0)


def with_micro_batch(config: RunConfig, sequences: int) -> RunConfig:
    """The same run with so many sequences in a forward pass."""
    return replace(config, training=replace(config.training, micro_batch=sequences))


def with_context(config: RunConfig, tokens: int) -> RunConfig:
    """The same run with one sequence of so many tokens a step."""
    training = replace(config.training, micro_batch=1, global_batch_tokens=tokens)
    return replace(config, tier=replace(config.tier, context=tokens), training=training)
