"""The largest micro-batch, by arithmetic: where the search by measurement begins, and all there is without the machine."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from elite.config import AUTO, RunConfig
from elite.facts import Device, ModelShape
from elite.plan.batch import BatchGeometry, accumulation_for, batch_geometry, sequences_of_a_rank, with_micro_batch
from elite.plan.executors import Prediction, choose_executor
from elite.plan.words import duration

SLOWER = 1e-3
"""A sequence may take this share longer in a larger micro-batch (times are sums of floating-point numbers)."""

FULL_PASS_TOKENS = 16384
"""Of a forward pass that keeps a device busy (fused_steps.json, phi2: at 4,096 tokens it waits for the host, at 16,384 it does not)."""
WORTH = 1.1
"""Times as fast as this a larger micro-batch must make a step to be spoken of."""


@dataclass(frozen=True)
class Settled:
    """A run whose micro-batch is a number."""

    config: RunConfig
    largest: int | None
    """Most sequences that fit in one forward pass, where `auto` asked for them; the micro-batch is the largest that deals the global
    batch evenly."""


def settled(config: RunConfig, device: Device, shape: ModelShape) -> Settled:
    """The run with `training.micro_batch=auto` made a number.

    Raises:
        PlanError: the global batch is no whole number of sequences on each rank.
    """
    if config.training.micro_batch != AUTO:
        return Settled(config, None)
    batch_geometry(config, device)
    largest = largest_micro_batch(config, device, shape)
    return Settled(dealt(config, device, largest), largest)


def dealt(config: RunConfig, device: Device, largest: int) -> RunConfig:
    """The run with the global batch dealt evenly to as few micro-batches of at most `largest` sequences as go."""
    sequences = sequences_of_a_rank(config, device)
    return with_micro_batch(config, sequences // accumulation_for(sequences, largest))


def largest_micro_batch(config: RunConfig, device: Device, shape: ModelShape) -> int:
    """Most sequences in one forward pass that fit and take no longer each than one alone; one if not even one fits.

    The executor is the one that would carry a single sequence: a larger micro-batch is no reason to stream. Under the streamed executor a
    larger micro-batch fills the host, until more has to be computed again, and a sequence takes longer.
    """
    one = choose_executor(with_micro_batch(config, 1), device, shape, 1)
    fixed = replace(config, executor=replace(config.executor, name=one.executor))

    def serves(sequences: int) -> bool:
        made = choose_executor(with_micro_batch(fixed, sequences), device, shape, 1)
        return made.fits and made.step_s <= sequences * one.step_s * (1 + SLOWER)

    low, high = 1, sequences_of_a_rank(config, device) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if serves(middle) else (low, middle)
    return low


def faster(config: RunConfig, device: Device, shape: ModelShape, made: Prediction, batch: BatchGeometry) -> Iterator[str]:
    """What a larger micro-batch would make of a step that is many short passes, in words; nothing where that is not worth a word."""
    if device.kind != "cuda" or batch.accumulation == 1 or not made.fits:
        return
    sequences = max(1, FULL_PASS_TOKENS // config.tier.context)
    larger = dealt(config, device, min(sequences, sequences_of_a_rank(config, device)))
    if larger.training.sequences <= config.training.sequences:
        return
    fixed = replace(larger, executor=replace(config.executor, name=made.executor))
    other = choose_executor(fixed, device, shape, batch_geometry(larger, device).accumulation)
    if not other.fits or other.step_s * WORTH > made.step_s:
        return
    now, then = config.training.sequences, larger.training.sequences
    steps = f"{duration(other.step_s)} a step instead of {duration(made.step_s)}"
    yield f"{then} sequences a pass instead of {now}: {steps}: training.micro_batch=auto"
