"""Values that no run can have, each rule stated once."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from elite.config import AUTO, TIERS, Executor, RunConfig, Schedule
from elite.errors import ConfigError
from elite.plan.stages import check_curriculum
from elite.printable import one_line


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


LARGEST = 1e15
"""Nothing that is counted, measured or drawn from is larger; a larger number is a slip, and arithmetic on it ends in overflow."""
AT_MOST = {
    "tier.context": 2**40,
    "tier.lora_rank": 2**16,
    "adapter.rank": 2**16,
    "training.global_batch_tokens": 2**36,
    "training.micro_batch": 2**16,
    "training.epochs": 1e6,
    "training.learning_rate": 1e3,
    "hardware.gpus": 2**16,
    "hardware.memory_gib": 2**20,
    "hardware.host_ram_gib": 2**20,
}
"""Where less is too much already: what is laid out, loops and is built in these numbers."""
LONGEST = 4096
"""Characters of a text: what file systems allow of a path."""
MAY_BE_EMPTY = frozenset({"hardware.compute_capability", "model.model_type"})
"""Texts that a preset fills in."""
LONGEST_NAME = 255
"""Bytes of one name in a path."""
PATHS = (
    "resume",
    "model.path",
    "data.repo",
    "data.path",
    "executor.folder",
    "output.root",
    "output.folder",
    "output.cache",
    "probe.file",
    "calibrate.file",
    "evaluate.run",
)


def check_values(config: RunConfig) -> None:
    """Refuse values out of range: what some fields may not be, then what no field may.

    Raises:
        ConfigError: one of them is.
    """
    # The narrower rules first: they say more.
    _check_rules(config)
    for name, value in _leaves(config, ""):
        _check_leaf(name, value)
    for name in PATHS:
        _check_path(name, attrgetter(name)(config))
    if config.tier.name not in (*TIERS, AUTO):
        raise ConfigError(f"tier.name={config.tier.name}: no such tier", f"tier=tier1 … tier={TIERS[-1]}, with tier.context= of your own")
    for name in ("model.extra", "model.rope_parameters"):
        for key in attrgetter(name)(config):
            # Names of that form belong to libraries' insides: `_target_`, `_attn_implementation`.
            if str(key).startswith("_") or not str(key).isidentifier():
                raise ConfigError(f"{name}.{key} is no field of a model's configuration", f"leave {name}.{key} out")


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field; the elements of a list under the list's name."""
    for field in fields(node):
        value, name = getattr(node, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        elif isinstance(value, list):
            yield from ((name, element) for element in value)
        else:
            yield name, value


def _check_leaf(name: str, value: Any) -> None:
    rule = ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        most = AT_MOST.get(name, LARGEST)
        if not math.isfinite(value):
            rule = "must be a finite number"
        elif value < 0:
            rule = "must not be negative"
        elif value > most:
            rule = f"must be at most {most:g}"
    elif isinstance(value, str):
        if len(value) > LONGEST:
            rule = f"must be at most {LONGEST} characters"
        elif one_line(value) != value:
            rule = "must not hold control characters or line breaks"
        elif not value.strip() and name not in MAY_BE_EMPTY:
            rule = "must not be empty"
    if rule:
        raise ConfigError(f"{name}={value}: {rule}", f"leave {name} out for its default")


def _check_path(name: str, value: str | None) -> None:
    if value is None:
        return
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name}={value}: {error}", f"{name}=PATH without ~, or with a user of this machine") from None
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        raise ConfigError(f"{name}={value}: a name in it is longer than {LONGEST_NAME} bytes", f"{name}=PATH that file systems allow")


def _check_rules(config: RunConfig) -> None:
    """What the values of some fields, and of some together, must satisfy."""
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
