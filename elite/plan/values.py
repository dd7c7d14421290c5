"""Values that no run can have, each rule stated once."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from elite.config import AUTO, Executor, RunConfig, Schedule
from elite.errors import ConfigError
from elite.plan.stages import check_curriculum


@dataclass(frozen=True)
class Rule:
    """What the values of some fields must satisfy."""

    words: str
    holds: Callable[[float], bool]
    fields: tuple[str, ...]


RULES = (
    Rule(
        "must be positive and finite",
        lambda value: 0 < value < math.inf,
        (
            "training.epochs",
            "training.max_steps",
            "training.global_batch_tokens",
            "training.lr_reference_tokens",
            "training.learning_rate",
            "training.eps",
            "training.max_grad_norm",
            "training.val_every",
            "training.checkpoint_every",
            "adapter.rank",
            "adapter.alpha",
            "tier.context",
            "schedule.power",
            "data.val_sequences",
            "data.max_file_bytes",
            "plan.max_step_minutes",
            "executor.chunk",
            "executor.block",
            "executor.slots",
            "calibrate.count",
            "calibrate.seconds",
            "lr_range.lowest",
            "lr_range.highest",
            "lr_range.accumulation",
            "evaluate.completions",
            "evaluate.tokens",
            "evaluate.temperature",
            "stability.max_rewinds",
        ),
    ),
    Rule(
        "must not be negative, and finite",
        lambda value: 0 <= value < math.inf,
        (
            "seed",
            "training.weight_decay",
            "training.completion_tokens",
            "plan.min_sequences",
            "probe.steps",
            "calibrate.seed",
            "evaluate.files",
            "stability.max_skips",
            "checkpoint.keep_best",
            "checkpoint.milestone_every",
            "watchdog.minutes",
        ),
    ),
    Rule(
        "must lie in [0, 1)",
        lambda value: 0 <= value < 1,
        ("training.beta1", "training.beta2", "adapter.dropout", "plan.headroom_fraction", "schedule.final_fraction", "lr_range.smoothing"),
    ),
    Rule("must lie in (0, 1)", lambda value: 0 < value < 1, ("data.val_fraction", "schedule.decay_fraction", "curriculum.start_fraction")),
    Rule("must lie in (0, 1]", lambda value: 0 < value <= 1, ("curriculum.full_at",)),
    Rule("must lie in [0, 1]", lambda value: 0 <= value <= 1, ("schedule.warmup_fraction",)),
    Rule("must be at least 3: each loss is of the step before", lambda value: value >= 3, ("lr_range.steps",)),
    Rule("must be above 1 and finite", lambda value: 1 < value < math.inf, ("lr_range.divergence",)),
    Rule("must be at least 2: a target's first token is not scored", lambda value: value >= 2, ("tier.target_length",)),
)


def check_values(config: RunConfig) -> None:
    """Refuse values out of range.

    Raises:
        ConfigError: one of them is.
    """
    for rule in RULES:
        for name in rule.fields:
            value = attrgetter(name)(config)
            # An optional field that is unset has no value to check.
            if value is not None and not rule.holds(value):
                raise ConfigError(f"{name}={value}: {rule.words}", f"leave {name} out for its default")
    micro_batch = config.training.micro_batch
    if micro_batch != AUTO and not (isinstance(micro_batch, int) and micro_batch > 0):
        raise ConfigError(f"training.micro_batch={micro_batch}: must be a positive whole number or {AUTO}", f"training.micro_batch={AUTO}")
    if config.training.mid_step_checkpoint and config.executor.name is not Executor.streamed:
        problem = (
            f"training.mid_step_checkpoint=true with executor={config.executor.name.value}: only a streamed step has parts that are kept"
        )
        raise ConfigError(problem, "executor=streamed executor.boundaries=disk")
    check_curriculum(config.curriculum)
    schedule = config.schedule
    if schedule.name is Schedule.wsd and schedule.warmup_fraction + schedule.decay_fraction > 1:
        raise ConfigError(
            f"schedule.warmup_fraction={schedule.warmup_fraction} and decay_fraction={schedule.decay_fraction} exceed the whole run",
            "together at most 1",
        )
    if config.lr_range.lowest >= config.lr_range.highest:
        problem = f"lr_range.lowest={config.lr_range.lowest:g} is not below lr_range.highest={config.lr_range.highest:g}"
        raise ConfigError(problem, "leave both out for their defaults")
    # It becomes a folder's name.
    if config.name is not None and not re.fullmatch(r"[^/\\\0.][^/\\\0]*", config.name):
        raise ConfigError(f"name={config.name!r}: must be a plain file name", "letters, digits, - and _")
