"""Constants of `elite/hardware/calibration.json` from measurements: what is reserved beyond what is allocated, and what the driver counts.

Any file with runs, or one run, whose `steps` have `allocated_peak_bytes` and `reserved_peak_bytes` will do: a calibration grid, a probe,
a comparison. A configuration counts with the highest allocated and the highest reserved peak of its steps. Where memory was taken ahead,
what is reserved says nothing of the allocator, but whether that much was enough: where it was, less might have been, too. What cannot be
given back is known of configurations that ran out of memory under a cap.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from elite import geometry
from elite.bench.calibrate.sample import stand_in
from elite.compose import from_overrides
from elite.config import Executor
from elite.errors import DataError
from elite.hardware.calibration import Ahead, Calibration, Context, Slack
from elite.optimizations import decide
from elite.optimizations.memory_pool import MemoryPool
from elite.plan import facts_of
from elite.plan.peaks import left_behind

LEAST = 3
"""From fewer configurations nothing is fitted."""
AT_THE_LIMIT = 0.99
"""Of the usable memory: whoever has reserved as much had to give cached memory back, so it says nothing about slack."""


MOST = 0.98
"""Of the configurations in pages stay below what is taken ahead."""
KEPT_BYTES = 2 * 20 * 1024**2
"""Who exceeds what was taken ahead by no more has kept to it: a page of large tensors and one of small ones (kLargeBuffer, c10/cuda)."""


@dataclass(frozen=True)
class Point:
    """One configuration's peaks, in bytes."""

    paged: bool
    """With `memory_pool`."""
    whole: bool
    """Under the whole executor."""
    allocated: float
    left: float
    """Logits left behind (elite/plan/peaks.py)."""
    reserved: float
    device: float | None
    """In use by the driver's account, where it was measured."""


@dataclass(frozen=True)
class Need:
    """What one configuration in pages needs beyond what is allocated and left behind."""

    whole: bool
    """Under the whole executor."""
    share: float
    """Of what is allocated."""
    exact: bool
    """It took that; else that was taken ahead, and it may need less."""


def fitted(known: Calibration, files: Sequence[Path]) -> Calibration:
    """`known` with every constant that these files can tell, and their names as its source.

    Raises:
        DataError: they tell none.
    """
    found = points(files)
    source = "measured: " + ", ".join(sorted({file.name for file in files}))
    made = known
    blocks, pages = ([point for point in found if point.paged is paged] for paged in (False, True))
    if len(blocks) >= LEAST:
        made = replace(made, blocks=slack(blocks, source))
    if len(pages) >= LEAST:
        made = replace(made, pages=slack(pages, source))
    gaps = [gap for file in files for gap in _gaps(json.loads(file.read_text()))]
    if len(gaps) >= LEAST:
        made = replace(made, least=slack(gaps, source))
    needs = [need for file in files for need in _needs(json.loads(file.read_text()))]
    by_executor = [[need for need in needs if need.whole is whole] for whole in (True, False)]
    if min(sum(need.exact for need in some) for some in by_executor) >= LEAST:
        made = replace(made, ahead=Ahead(_most(by_executor[0]), _most(by_executor[1]), source))
    beyond = [point.device - point.reserved for point in found if point.device is not None]
    if len(beyond) >= LEAST:
        made = replace(made, context=Context(median(beyond), source))
    if made == known:
        raise DataError(f"{len(found)} configurations measured on a GPU: fewer than {LEAST} of a kind", "measure more before fitting")
    return made


def _most(found: Sequence[Need]) -> float:
    """The share that `MOST` of them stay below: the product-limit estimate, from the largest down (Kaplan & Meier 1958, with what is known
    from above in place of what is known from below)."""
    below, chosen = 1.0, 0.0
    for share in sorted({need.share for need in found if need.exact}, reverse=True):
        if below < MOST:
            break
        chosen = share
        below *= 1 - sum(need.exact and need.share == share for need in found) / sum(need.share <= share for need in found)
    return round(chosen, 4)


def slack(found: Sequence[Point], source: str) -> Slack:
    """Share and rounding with the least sum of squared relative errors, neither of them negative."""
    allocated, left, reserved = (np.array([getattr(point, name) for point in found]) for name in ("allocated", "left", "reserved"))

    def solved(*columns: Any) -> list[float]:
        matrix = np.stack([column / reserved for column in columns], axis=1)
        values, *_ = np.linalg.lstsq(matrix, 1 - left / reserved, rcond=None)
        return [float(value) for value in values]

    scale, rounding = solved(allocated, np.ones(len(found)))
    if rounding < 0:
        (scale,) = solved(allocated)
        rounding = 0.0
    if scale < 1:
        scale, rounding = 1.0, max(0.0, float(median(reserved - allocated - left)))
    return Slack(round(scale - 1, 5), float(round(rounding)), source)


def points(files: Sequence[Path]) -> list[Point]:
    """Configurations of these files that ran on a GPU, well below the device's limit."""
    return [point for file in files for point in _points(json.loads(file.read_text()))]


def _points(content: dict[str, Any]) -> Iterator[Point]:
    for point, ahead in _peaks(content):
        if not ahead:
            yield point


def _gaps(content: dict[str, Any]) -> Iterator[Point]:
    """Configurations that ran out of memory under a cap: all of it was reserved, but for what could not be given back."""
    for run in content.get("runs", []):
        if "cap_bytes" in run and "in_gaps_bytes" in run:
            cap, whole = run["cap_bytes"], run["executor"] == Executor.whole.value
            yield Point(True, whole, cap - run["in_gaps_bytes"], 0.0, cap, None)


def _needs(content: dict[str, Any]) -> Iterator[Need]:
    for point, ahead in _peaks(content):
        if point.paged:
            kept = point.reserved <= ahead + KEPT_BYTES
            taken = ahead if kept else point.reserved
            yield Need(point.whole, (taken - point.allocated - point.left) / point.allocated, not kept)


def _peaks(content: dict[str, Any]) -> Iterator[tuple[Point, float]]:
    """Configurations, each with what was taken ahead for it."""
    for run in content.get("runs", [content]):
        steps = [step for step in run.get("steps", []) if "reserved_peak_bytes" in step]
        if "probe" in run:
            steps.append(run["probe"])
        if not steps or run.get("outcome", "ran") != "ran" or "cap_bytes" in run:
            continue
        allocated, reserved = (max(step[f"{kind}_peak_bytes"] for step in steps) for kind in ("allocated", "reserved"))
        if reserved < AT_THE_LIMIT * run.get("usable_bytes", float("inf")):
            whole, paged = run["executor"] == Executor.whole.value, MemoryPool.name in run["active"]
            device, ahead = run.get("measured", {}).get("device_bytes"), run.get("predicted", {}).get("ahead_bytes", 0.0)
            yield Point(paged, whole, allocated, _left(run, content) if whole else 0.0, reserved, device), ahead


def _left(run: dict[str, Any], content: dict[str, Any]) -> float:
    """What a drawn configuration leaves behind; what others leave is not known, and counts as slack."""
    if "draw" not in content:
        return 0.0
    config = from_overrides(*run["overrides"]).config
    facts = facts_of(config, stand_in(config, content["draw"]["card"]), geometry.shape(config.model), Executor.whole.value)
    return left_behind(facts, decide(config.optimizations, facts), Executor.whole)
