"""The runs of an ablation, and what each of them changes: all parts, all but one, none, one alone.

A run is named by its `ablation.variant`, so it is an override like any other: a sweep multiplies it with further ones, and it can be run
alone.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from elite.errors import ConfigError
from elite.optimizations import ALL, OptimizationsConfig

EVERYTHING, NOTHING = "all", "none"
"""What leaving one out is held against, and what one alone is."""
WITHOUT, ONLY = "without_", "only_"
NAMES = tuple(kind.name for kind in ALL)


class AblationKind(Enum):
    """Which runs of a sweep show what each active optimization does."""

    none = "none"
    leave_one_out = "leave_one_out"
    """All of them, and all but one."""
    one_at_a_time = "one_at_a_time"
    """None of them, and each alone."""
    both = "both"


@dataclass(frozen=True)
class AblationConfig:
    """What each active optimization costs and saves, by runs that differ in one of them."""

    kind: AblationKind = AblationKind.none
    variant: str | None = None
    """Which of these runs this one is: `all`, `without_NAME`, `none` or `only_NAME`; the sweep sets it."""


def variants(kind: AblationKind, parts: Sequence[str]) -> list[str]:
    """The runs that show what these optimizations do, each baseline before what is held against it."""
    without = [EVERYTHING, *(WITHOUT + part for part in parts)]
    only = [NOTHING, *(ONLY + part for part in parts)]
    chosen = {
        AblationKind.none: [],
        AblationKind.leave_one_out: without,
        AblationKind.one_at_a_time: only,
        AblationKind.both: without + only,
    }
    return chosen[kind]


def part_of(variant: str | None) -> str | None:
    """The optimization that a variant leaves out or has alone."""
    if variant is None or variant in (EVERYTHING, NOTHING):
        return None
    return variant.removeprefix(WITHOUT if variant.startswith(WITHOUT) else ONLY)


def baseline_of(variant: str) -> str:
    """The variant that one is held against."""
    return EVERYTHING if variant == EVERYTHING or variant.startswith(WITHOUT) else NOTHING


def varied(switches: OptimizationsConfig, variant: str | None) -> OptimizationsConfig:
    """The optimizations with a variant carried out on them; of some that were varied so before, the same.

    Raises:
        ConfigError: there is no such variant.
    """
    if variant is None:
        return switches
    known = variants(AblationKind.both, NAMES)
    if variant not in known:
        close = difflib.get_close_matches(variant, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "python train.py mode=plan names them"
        raise ConfigError(f"ablation.variant={variant}: all, none, without_NAME or only_NAME of an optimization", hint)
    part = part_of(variant)
    wanted: dict[str, bool] = {}
    if baseline_of(variant) == NOTHING:
        wanted = {name: name == part for name in NAMES}
    elif part is not None:
        wanted = {part: False}
    return switches.switched(wanted)
