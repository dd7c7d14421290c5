"""The stages of a run: with curriculum=context the context grows, while the tokens of an optimizer step stay.

In a stage of 1/k of the tier's context each sequence is dealt as k rows. The micro-batch has k times as many rows and as many tokens as
before, so accumulation, the steps of an epoch and all that grows with tokens alone stay as they are; attention takes 1/k of the time.

Source: Li et al. 2022, arXiv:2108.06084 (sequence length warm-up).
"""

from dataclasses import dataclass, replace

from elite.config import RunConfig
from elite.curriculum import Curriculum, CurriculumConfig, Measure
from elite.errors import ConfigError, PlanError
from elite.facts import Device, ModelShape
from elite.plan.batch import CONTEXT_MULTIPLE, MIN_CONTEXT
from elite.plan.executors import Prediction, choose_executor, held_to

WHOLE = 1e-6
"""One over a share may be off a whole number by this."""
LEAST_SHARE = 1e-6
"""Of a context."""


@dataclass(frozen=True)
class ContextStage:
    """Optimizer steps at one context."""

    context: int
    parts: int
    """Rows that a sequence of the tier's context is dealt as."""
    first_step: int
    """Steps before it."""
    steps: int


@dataclass(frozen=True)
class PlannedStage:
    """A stage, predicted. Bytes of one device, seconds."""

    context: int
    micro_batch: int
    """Rows in one forward pass."""
    first_step: int
    steps: int
    total_bytes: float
    host_bytes: float
    step_s: float
    tokens_per_s: float
    """Of all ranks together."""


def check_curriculum(config: CurriculumConfig) -> None:
    """Refuse stages that do not make a growing context.

    Raises:
        ConfigError: a share or fraction is out of range or order.
    """
    shares, until = list(config.shares), list(config.until)
    whole = all(LEAST_SHARE <= share <= 1 and abs(1 / share - round(1 / share)) < WHOLE / share for share in shares)
    if not whole or not shares or shares != sorted(set(shares)) or shares[-1] != 1:
        rule = "each must be one over a whole number, larger than the one before, and the last 1"
        raise ConfigError(f"curriculum.shares={shares}: {rule}", "curriculum.shares=[0.25,0.5,1]")
    if len(until) != len(shares) - 1 or until != sorted(set(until)) or not all(0 < end < 1 for end in until):
        rule = f"one rising fraction in (0, 1) for each of the {len(shares)} stages but the last"
        ends = ",".join(f"{(i + 1) / len(shares):.2g}" for i in range(len(shares) - 1))
        raise ConfigError(f"curriculum.until={until}: {rule}", f"curriculum.until=[{ends}]")


def context_stages(config: RunConfig, steps: int) -> tuple[ContextStage, ...]:
    """The stages of a run of so many optimizer steps; one stage unless the context grows.

    Raises:
        PlanError: a stage has no step, or its context is none that a row can have.
    """
    context, curriculum = config.tier.context, config.curriculum
    if curriculum.name is not Curriculum.context:
        return (ContextStage(context, 1, 0, steps),)
    ends = [0, *(round(end * steps) for end in curriculum.until), steps]
    stages = []
    for share, first, stop in zip(curriculum.shares, ends[:-1], ends[1:], strict=True):
        parts = round(1 / share)
        if stop == first:
            problem = f"curriculum.until={list(curriculum.until)} leaves no step for {share:g} of the context in a run of {steps} steps"
            raise PlanError(problem, "longer stages, more steps (training.max_steps, training.epochs) or curriculum=none")
        if context % parts or context // parts % CONTEXT_MULTIPLE or context // parts < MIN_CONTEXT:
            rule = f"must be a multiple of {CONTEXT_MULTIPLE}, at least {MIN_CONTEXT}"
            problem = f"curriculum.shares: {share:g} of tier.context={context} is {context / parts:g} tokens, which {rule}"
            raise PlanError(problem, "other shares, such as curriculum.shares=[0.5,1] curriculum.until=[0.5]")
        stages.append(ContextStage(context // parts, parts, first, stop - first))
    return tuple(stages)


def predict_stages(
    config: RunConfig, device: Device, shape: ModelShape, made: Prediction, accumulation: int, steps: int
) -> list[tuple[ContextStage, Prediction]]:
    """Each stage with its prediction, in the executor and layout of the last one, which has the whole context.

    Args:
        made: of the whole context.
    """
    found = []
    for stage in context_stages(config, steps):
        short = replace(config, tier=replace(config.tier, context=stage.context))
        short = replace(short, training=replace(config.training, micro_batch=config.training.sequences * stage.parts))
        found.append((stage, made if stage.parts == 1 else choose_executor(held_to(short, made), device, shape, accumulation)))
    return found


def planned(stage: ContextStage, made: Prediction, step_tokens: int) -> PlannedStage:
    """What of a stage's prediction is printed and kept."""
    return PlannedStage(
        context=stage.context,
        micro_batch=made.facts.micro_batch,
        first_step=stage.first_step,
        steps=stage.steps,
        total_bytes=made.estimate.total,
        host_bytes=made.host_bytes,
        step_s=made.step_s,
        tokens_per_s=step_tokens / made.step_s,
    )


def curriculum_words(config: CurriculumConfig) -> str:
    """What the curriculum does, for people."""
    if config.name is Curriculum.context:
        ends = [*(f"until {end:.0%} of the steps" for end in config.until), "to the end"]
        return "context: " + ", ".join(f"{share:g} of it {end}" for share, end in zip(config.shares, ends, strict=True))
    if config.name is Curriculum.difficulty:
        opens = f"the easiest {config.start_fraction:.0%} open at first, all at {config.full_at:.0%} of the steps"
        scored = "; a forward pass over the corpus before the first step scores it" if config.measure is Measure.loss else ""
        return f"difficulty by {config.measure.value}, {config.pacing.value} pacing: {opens}{scored}"
    return config.name.value
