"""A run that goes on under a command that differs from the one it was begun with: what is taken over, and what is refused.

What decides the weights stays as it was: model, data, optimizations, schedule, number of steps. The learning rate's schedule, curricula and
averages are laid out over all steps, so that a run made longer would be no run that could have been begun so.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from elite.config import RunConfig

FREE = (
    "logger.",
    "stability.",
    "checkpoint.",
    "watchdog.",
    "output.cache",
    "executor.folder",
    "training.val_every",
    "training.checkpoint_every",
    "training.preflight",
)
"""Fields, and groups of them, that may change while a run goes on."""
ELSEWHERE = ("mode", "resume", "output.", "plan.", "hardware.gpus", "probe.", "calibrate.", "lr_range.", "ablation.", "evaluate.")
"""Fields that say nothing about a run that has begun. Where it lies, its plan and its ranks stand in its folder."""
NAMED = 4
"""Fields that a refusal names at most."""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= flat(value, f"{prefix}{field.name}.") if is_dataclass(value) else {f"{prefix}{field.name}": value}
    return found


def among(name: str, patterns: Iterable[str]) -> bool:
    """Whether a field is one of these, or in one of the groups among them, which end in a point."""
    return any(name.startswith(pattern) if pattern.endswith(".") else name == pattern for pattern in patterns)


def with_values(config: Any, values: dict[str, Any]) -> Any:
    """The configuration with these fields, by their dotted names, replaced."""
    own: dict[str, Any] = {}
    for name, value in values.items():
        group, _, rest = name.partition(".")
        own[group] = own.get(group, {}) | {rest: value} if rest else value
    groups = {name: with_values(getattr(config, name), own[name]) for name in own if is_dataclass(getattr(config, name))}
    return replace(config, **(own | groups))


def as_begun(config: RunConfig) -> RunConfig:
    """The configuration with everything that may change at its default: what two starts of one run have in common."""
    usual = flat(RunConfig())
    return with_values(config, {name: usual[name] for name in flat(config) if among(name, FREE)})


def typed(now: RunConfig, empty: RunConfig, overrides: Collection[str]) -> Callable[[str], bool]:
    """Whether a command says something about a field: it names the field or its group, or a group that it names sets the field.

    Args:
        now: what the command composes.
        empty: what a command without overrides composes.
        overrides: of the command.
    """
    said, usual = flat(now), flat(empty)
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    # An automatic tier was settled when the run began.
    settled = ("tier.",) if now.tier.name == "auto" else ()

    def says(name: str) -> bool:
        named = any(name == key or name.startswith(f"{key}.") for key in keys)
        return (named or said[name] != usual[name]) and not among(name, settled)

    return says


def changes(begun: RunConfig, now: RunConfig, says: Callable[[str], bool]) -> tuple[dict[str, Any], list[str]]:
    """What a command changes in a run.

    Args:
        begun: the run's configuration.
        now: what the command composes.
        says: whether the command says something about a field.

    Returns:
        The fields that are taken over with their new values, and in words those that may not change.
    """
    old, new = flat(begun), flat(now)
    differing = [name for name in new if new[name] != old[name] and says(name)]
    taken = {name: new[name] for name in differing if among(name, FREE)}
    refused = [name for name in differing if not among(name, (*FREE, *ELSEWHERE))]
    return taken, [f"{words(name, new[name])} (not {plain(old[name])})" for name in refused]


def refusal(refused: list[str]) -> str:
    """What may not change, in one line."""
    more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    return f"a run that has begun goes on as it was; refused: {', '.join(refused[:NAMED])}{more}"


def words(name: str, value: Any) -> str:
    """A field as it is typed."""
    return f"{name}={plain(value)}"


def plain(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return "null"
    text = str(value.value if isinstance(value, Enum) else value)
    return text.lower() if isinstance(value, bool) else text
